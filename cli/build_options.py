"""The options of ``build`` that say what is built: the model, its variants, its images."""

from __future__ import annotations

import click

from tocom_export.model.outputs import OUTPUTS

from .model_options import Channels, checkpoint_options, form_options
from .options import (
    DEGREE,
    DEGREES,
    FILE,
    FiniteFloat,
    NamedSchedule,
    Shares,
    add_options,
    method_options,
)

model_options = add_options(
    click.option(
        "--targets",
        type=DEGREES,
        default="0,4,8,12,16",
        help="Degrees to export: 4,8,12,16 or 0-16 or 0,4-16:4; a bank spans 0 to 16, without one "
        "they may be higher (long sequences).",
    ),
    click.option(
        "--schedule",
        "schedules",
        type=NamedSchedule(),
        multiple=True,
        help="A variant with a degree for each layer (NAME=20,17,11,6,1,3), or a .json file that "
        "lists them; or NAME=every:K, which removes tokens in every K-th layer alone, as many as "
        "make it cost what degree 16 in each does (every:K:R: degree R), and runs faster; "
        "or NAME=keep:SHARE; repeatable.",
    ),
    click.option(
        "--keep",
        "keeps",
        type=Shares(),
        multiple=True,
        help="A variant that leaves this share of the patches after the last layer, each layer "
        "removing at the same rate: 0.5 becomes keep50; repeatable.",
    ),
    click.option(
        "--source",
        type=DEGREE,
        help="Degree the checkpoint was trained at; default: what its metadata say, else 0.",
    ),
    click.option(
        "--model",
        metavar="NAME",
        help="A timm model name, also hf-hub:OWNER/NAME or local-dir:PATH, or 'reference' (the "
        "default: the model that ships inside the package).",
    ),
    checkpoint_options(
        ".safetensors, .pth, .bin or .tar with the model's weights, or a folder of Hugging Face's "
        "or timm's; default: timm's pretrained weights."
    ),
    form_options,
    click.option(
        "--bank",
        metavar="FILE",
        help="ToCom bank, ours (.safetensors) or the authors' "
        "layout (.pth); default for 'reference': the shipped one; 'none': no compensation.",
    ),
    click.option(
        "--scale",
        type=FiniteFloat(0),
        default=0.1,
        help="What the bank's steps are multiplied by; the paper uses 0.01 to 0.15.",
    ),
    method_options("the bank's, else the checkpoint's"),
    click.option(
        "--precision",
        type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
        default="fp32",
        help="Type of the weights and of the arithmetic; int8 wants --calibrate.",
    ),
    click.option(
        "--output",
        "outputs",
        type=click.Choice(OUTPUTS),
        multiple=True,
        help="What engines give: logits, embedding (what the head reads), tokens (the features of "
        "each patch, merged ones given back to all), map (the token that each patch went into), in "
        "the order given; repeatable; default: logits where the model has classes, else the "
        "embedding.",
    ),
    click.option(
        "--l2-norm", "unit_embedding", is_flag=True, help="Divide each embedding by its length."
    ),
    click.option(
        "--classes",
        type=FILE,
        metavar="FILE",
        help="Names of the classes: one a line, a JSON list, or a JSON object from index to name.",
    ),
    click.option(
        "--mean",
        type=Channels(),
        help="What is taken off pixels from 0 to 1; default, as of the other image statistics: the "
        "checkpoint's, else timm's for the model.",
    ),
    click.option("--std", type=Channels(), help="What pixels are then divided by."),
    click.option(
        "--crop-pct",
        type=click.FloatRange(0, 1, min_open=True),
        help="Share of the resized shorter side that the centre crop keeps.",
    ),
    click.option(
        "--interpolation",
        type=click.Choice(["bilinear", "bicubic"]),
        help="By which images are resized.",
    ),
)
