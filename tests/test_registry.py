"""Method configs and how they are found."""

import dataclasses
import re
from importlib.metadata import EntryPoint
from importlib.util import find_spec

import pytest

import mllm_vision as mv
from mllm_vision import registry
from mllm_vision.operations import KeepConfig
from mllm_vision.reducers import DownsampleConfig, HiPruneConfig
from mllm_vision.registry import MethodConfig


def test_every_file_of_a_method_folder_is_listed():
    listed = {row.config.__module__ for row in mv.methods()}
    folders = [f"mllm_vision.{kind}" for kind in registry.KIND_PACKAGES if find_spec(f"mllm_vision.{kind}")]
    assert listed == {module.__name__ for folder in folders for module in registry.package_modules(folder)}


@pytest.mark.parametrize("row", mv.methods(), ids=lambda row: row.name)
def test_every_method_says_what_it_is_and_survives_storage(row):
    required = {field: 7 for field, default in row.fields.items() if default == "required"}
    config = row.config(**required)
    assert config.to_dict() == {"type": row.name} | required
    assert MethodConfig.from_dict(config.to_dict()) == config
    assert row.paper
    assert ("keep" in required) == (row.kind == "reducer")
    assert set(row.fields) == {field.name for field in dataclasses.fields(config)}
    documented = row.config.__doc__.split("Args:")[1]
    assert all(f"{field}:" in documented for field in row.fields)


def test_fields_that_differ_from_their_defaults_are_stored():
    config = HiPruneConfig(keep=0.25, alpha=0.2, object_layer=3)
    assert config.to_dict() == {"type": "hiprune", "keep": 0.25, "alpha": 0.2, "object_layer": 3}
    assert MethodConfig.from_dict(config.to_dict()) == config


def test_an_unknown_method_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match=r"unknown method 'hi-prune'; the methods are .*hiprune.*random"):
        MethodConfig.from_dict({"type": "hi-prune", "keep": 3})
    with pytest.raises(ValueError, match=r"a method needs a 'type'.*hiprune"):
        MethodConfig.from_dict({"keep": 3})
    with pytest.raises(ValueError, match="hiprune needs keep"):
        MethodConfig.from_dict({"type": "hiprune", "alpha": 0.2})


def test_an_unknown_field_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match=r"HiPruneConfig has no field kep; its fields are keep, alpha, object_layer"):
        HiPruneConfig(kep=3)
    with pytest.raises(ValueError, match=r"HiPruneConfig has no field layer"):
        MethodConfig.from_dict({"type": "hiprune", "keep": 3, "layer": 2})


def test_a_third_party_method_is_found_through_its_entry_point(monkeypatch):
    point = EntryPoint("theirs", "tests.third_party", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == registry.ENTRY_POINT_GROUP else [])
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    registry.discover.cache_clear()
    assert "keep_first" in {row.name for row in mv.methods()}
    assert MethodConfig.from_dict({"type": "keep_first", "keep": 2}).keep == 2
    registry.discover.cache_clear()


def test_two_methods_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two methods are called 'hiprune'"):

        class Impostor(KeepConfig, type="hiprune"):
            pass


def test_a_name_no_method_file_exports_is_an_attribute_error():
    from mllm_vision import reducers

    with pytest.raises(AttributeError, match=r"has no attribute 'HiPrunConfig'; it has .*HiPruneConfig"):
        reducers.HiPrunConfig  # noqa: B018


def test_methods_are_read_from_a_line():
    both = registry.parse_methods("downsample:keep=1/2+hiprune:keep=9:alpha=0.2", "reducer")
    assert both == [DownsampleConfig(keep=0.5), HiPruneConfig(keep=9, alpha=0.2)]
    assert registry.parse_methods("hiprune:keep=3:neighbours=flat") == [HiPruneConfig(keep=3, neighbours="flat")]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "a name must come first, as in name:field=value, got ''"),
        ("hiprune:keep=3+", "a name must come first"),
        ("hiprune:keep", "a setting is written field=value, got 'keep'"),
        ("hiprune", "hiprune needs keep"),
        ("hiprune:kep=3", "HiPruneConfig has no field kep; its fields are keep"),
        ("hiprune:keep=many", "keep must be"),
        ("hiprune:keep=1/0", "keep must be"),
        ("nothing:keep=1", "unknown method 'nothing'; the methods are"),
    ],
)
def test_a_line_that_names_no_methods_is_answered_with_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        registry.parse_methods(spec)


def test_a_method_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="hiprune is a method of kind reducer, not decoding; of that kind there are"):
        registry.parse_methods("hiprune:keep=3", "decoding")
