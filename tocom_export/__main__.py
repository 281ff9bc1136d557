"""``python -m tocom_export``: the command line."""


def run() -> None:
    """What the script ``tocom-export`` does."""
    from tocom_export.cli.main import main

    main()


if __name__ == "__main__":
    run()
