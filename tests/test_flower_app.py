"""The Flower app's run config: a key that is not there nobody can set. Needs no Flower."""

import dataclasses
import tomllib
from pathlib import Path

from baffle.config import TrainConfig

APP = Path(__file__).parents[1] / "examples" / "flower"
OWN = {"run", "resume", "least", "patience", "poll"}  # of baffle.flower.Settings


def test_the_app_lists_every_setting_of_train():
    config = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings = {f.name.replace("_", "-") for f in dataclasses.fields(TrainConfig)}
    assert set(config) == OWN | settings
    assert {config[name] for name in settings} == {""}  # not set, so that presets and defaults hold


def test_the_example_job_can_be():
    TrainConfig.resolve(tomllib.loads((APP / "federation.toml").read_text()))
