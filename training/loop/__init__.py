"""The training loop that distilling a bank and fine-tuning a model share."""
