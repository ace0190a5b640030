"""`FusionConfig`: what is wrong is an error at once, with what is known and a hint."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from npu_fusion import ConfigError, FusionConfig
from npu_fusion.config import EXECUTORS, ROUNDINGS, TARGETS
from npu_fusion.report import config_dict
from npu_fusion.rule import registered_rules


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "ascend910c"}, ["unknown target 'ascend910c'", "Did you mean 'ascend910b'?", *TARGETS]),
        ({"rounding": "exakt"}, ["unknown rounding 'exakt'", "Did you mean 'exact'?", *ROUNDINGS]),
        ({"executor": "egaer"}, ["unknown executor 'egaer'", "Did you mean 'eager'?", *EXECUTORS]),
        ({"rules": ["rmsnorm"]}, ["unknown rule 'rmsnorm'", "Did you mean 'rms_norm'?", "add_rms_norm"]),
        ({"disable": ["rms-norm"]}, ["unknown rule 'rms-norm'", "Did you mean 'rms_norm'?"]),
        ({"rules": "rms_norm"}, ["'rules' takes a sequence of rule names, not 'rms_norm'"]),
        ({"disable": 3}, ["'disable' takes a sequence of rule names, not 3"]),
        ({"verify": "yes"}, ["'verify' takes True or False, not 'yes'"]),
        ({"emulate": 1}, ["'emulate' takes True or False, not 1"]),
        ({"merge_weights": None}, ["'merge_weights' takes True or False"]),
        ({"capture_limit": 0}, ["'capture_limit' takes a positive number, not 0"]),
        ({"capture_limit": True}, ["'capture_limit' takes a positive number"]),
        ({"executor_options": "mode"}, ["'executor_options' takes a dict of options by name, not 'mode'"]),
        ({"executor": "graph", "executor_options": {"mode": 1}}, ["executor 'graph' hands the graph to no compiler"]),
        ({"extra_rules": ("rms_norm",)}, ["'extra_rules' takes rules", "'rms_norm'"]),
        ({"tagret": "cpu"}, ["unknown option 'tagret'", "Did you mean 'target'?", "rounding", "executor", "verify"]),
    ],
)
def test_errors_name_what_is_known(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        FusionConfig.from_options(options)
    for word in words:
        assert word in str(error.value)


def test_an_unknown_value_without_anything_like_it_has_no_hint() -> None:
    with pytest.raises(ConfigError) as error:
        FusionConfig(target="zzz")
    assert "Did you mean" not in str(error.value)


def test_config_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="unknown mode"):
        FusionConfig.from_options(mode="max-autotune")


def test_modes() -> None:
    assert FusionConfig.from_options(mode="reduce-overhead").executor == "graph"
    assert FusionConfig.from_options(mode="default") == FusionConfig()
    assert FusionConfig.from_options({"executor": "eager"}, mode="reduce-overhead").executor == "eager"
    with pytest.raises(ConfigError, match="Known: default, reduce-overhead"):
        FusionConfig.from_options(mode="fastest")


def test_every_known_value_is_accepted() -> None:
    for name, values in (("target", TARGETS), ("rounding", ROUNDINGS), ("executor", EXECUTORS)):
        for value in values:
            assert getattr(FusionConfig.from_options({name: value}), name) == value
    for rule in registered_rules():
        assert FusionConfig(rules=[rule.name]).rules == (rule.name,)


def test_a_config_is_a_value() -> None:
    config = FusionConfig(rules=["rms_norm"], disable=["rms_norm"])
    assert config == FusionConfig(rules=("rms_norm",), disable=("rms_norm",))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target = "cpu"  # type: ignore[misc]


def test_executor_options_are_a_value() -> None:
    options = {"mode": "reduce-overhead", "clone_output": True}
    config = FusionConfig(executor="torchair", executor_options=options)
    assert dict(config.executor_options) == options
    assert config == FusionConfig(executor="torchair", executor_options=dict(reversed(options.items())))
    assert hash(config) == hash(dataclasses.replace(config))
    assert config_dict(config)["executor_options"] == options


def test_options_reach_torch_compile_as_our_error() -> None:
    compiled = torch.compile(torch.sin, backend="npu_fusion", options={"verfy": True})
    with pytest.raises(Exception, match="Did you mean 'verify'"):
        compiled(torch.ones(2))
