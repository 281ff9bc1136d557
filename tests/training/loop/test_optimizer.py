from __future__ import annotations

from dataclasses import replace

import pytest

from tocom_export.errors import InputError
from tocom_export.training.loop.optimizer import Hyperparameters

# timm leaves image files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_the_learning_rate_falls_from_its_peak_to_zero(make_run, hyperparameters: Hyperparameters):
    run = make_run("run")
    run.train(replace(hyperparameters, warmup_epochs=0))
    rates = [lr for _, _, lr in run.losses]
    assert rates[0] == 1e-2
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 5e-4


def test_the_learning_rate_rises_during_warm_up(make_run):
    run = make_run("run")
    run.train()
    rates = [lr for _, _, lr in run.losses]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[:4] == sorted(rates[:4])
    assert max(rates) == rates[3] == 1e-2
    assert rates[3:] == sorted(rates[3:], reverse=True)


@pytest.mark.parametrize("warmup", [3, 4])
def test_a_warm_up_of_all_epochs_is_refused(warmup: int):
    with pytest.raises(InputError, match=f"`warmup` {warmup} must be fewer than the 3 `epochs`"):
        Hyperparameters(3, 4, 1e-2, warmup_epochs=warmup)
