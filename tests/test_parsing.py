"""YAML as configs use it, and dataclasses out of it: every mistake is one line that names key and cure."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vavae_fast.errors import BadInput, require
from vavae_fast.parsing import (
    MAX_BYTES,
    MAX_DEPTH,
    apply_overrides,
    flatten,
    parse_yaml,
    read_yaml,
    shipped_configs,
    to_dataclass,
    to_mapping,
    to_yaml,
)


@dataclass(frozen=True)
class Inner:
    width: int = 4
    rate: float = 0.5

    def __post_init__(self):
        require(self.width > 0, "width", self.width, "above 0")


@dataclass(frozen=True)
class Outer:
    name: str = "a"
    on: bool = False
    kind: Literal["x", "y"] = "x"
    channels: int | Literal["all"] = 3
    pair: tuple[float, float] | None = None
    sizes: list[int] = field(default_factory=list)
    free: dict = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Needs:
    path: str


def one_line(caught) -> str:
    text = str(caught.value)
    assert "\n" not in text
    return text


# -- scalars: YAML 1.2's core schema ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4), ("1.0e-06", 1e-6), ("2E5", 2e5), (".5", 0.5), ("5.", 5.0), ("-3", -3), ("+7", 7), ("012", 12), ("0", 0),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("1_000", "1_000"), ("0x1f", "0x1f"), ("2024-01-01", "2024-01-01"),
        ("12:30:45", "12:30:45"), ('"1e-4"', "1e-4"), ("'null'", "null"), ("path/to/x", "path/to/x"), ("[1, 2.5, a]", [1, 2.5, "a"]),
        ("{a: 1, b: {c: null}}", {"a": 1, "b": {"c": None}}),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, value):
    found = parse_yaml(text, "test")
    assert found == value and type(found) is type(value)


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=12)
    | st.sampled_from(["1e-4", "012", "09", "no", "0x1f", "1_0", "~", "null", ".5", "5.", "+1", "-", "=", "<<", "2024-01-01", "1:30", "0o7", ".inf"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3), max_leaves=6,
))  # fmt: skip
def test_what_is_written_reads_back_as_it_was(value):
    """A run's config.yaml gives back the config: `exp_name: "1e-4"` stays text, 1e-06 stays a number."""

    @dataclass(frozen=True)
    class Anything:
        free: dict

    back = parse_yaml(to_yaml(Anything({"key": value})), "test")["free"]["key"]
    assert back == value and type(back) is type(value)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("a: 1\nb: 2\na: 3\n", ["x.yaml:3", "duplicate key 'a'", "keep one"]),
        ("a: &x 1\nb: *x\n", ["x.yaml:2", "aliases"]),
        ("a: &a [1]\nb: {<<: *a}\n", ["aliases"]),
        ("? [1, 2]\n: 3\n", ["keys must be plain words"]),
        ("a: [1, 2\n", ["x.yaml", "not valid YAML"]),
        ("a:\tb: c\n", ["x.yaml:1", "not valid YAML"]),
        ("a: \x00\n", ["x.yaml", "not valid YAML"]),
        ("a: !!python/object/apply:os.system [ls]\n", ["x.yaml:1", "tag"]),
        ("a: !!python/name:os.system ''\n", ["x.yaml:1", "tag"]),
        ("a: !!timestamp nonsense\n", ["x.yaml:1", "tag"]),
        ("a: !!int ten\n", ["x.yaml:1", "cannot read"]),
        ("a: !!bool maybe\n", ["x.yaml:1", "cannot read"]),
        ("a: " + "9" * 5000 + "\n", ["x.yaml:1", "cannot read"]),
        ("--- 1\n--- 2\n", ["x.yaml", "not valid YAML"]),
        ("", ["x.yaml", "empty"]),
        ("- 1\n", ["x.yaml", "a list", "expected a config"]),
        ("text\n", ["x.yaml", "text", "expected a config"]),
    ],
)
def test_what_is_no_config_is_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(BadInput) as caught:
        mapping = read_yaml(path)
        pytest.fail(f"accepted: {mapping}")
    message = one_line(caught)
    assert all(word in message for word in words), message
    assert len(message) < 400


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 5000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ("{a: ", "}")])
def test_deep_nesting_is_refused(depth, opening, closing):
    with pytest.raises(BadInput, match="nested too deeply"):
        parse_yaml(opening * depth + closing * depth, "x")


def test_files_over_the_cap_are_not_read(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("a: 1\n" + "#" * MAX_BYTES)
    for endless in ("/dev/zero", "/dev/urandom"):  # no size that could be asked for
        with pytest.raises(BadInput, match="over 100 kB"):
            read_yaml(endless)
    with pytest.raises(BadInput, match="over 100 kB"):
        read_yaml(path)


def test_configs_of_ours_are_found_anywhere(tmp_path, monkeypatch):
    """As the README names them, where no checkout is the working directory; a file that is there comes first."""
    monkeypatch.chdir(tmp_path)
    assert read_yaml("configs/demo.yaml") == read_yaml(shipped_configs() / "demo.yaml")
    with pytest.raises(BadInput, match=r"^configs/demmo.yaml: no such config file; did you mean .*demo\.yaml"):
        read_yaml("configs/demmo.yaml")
    with pytest.raises(BadInput, match=r"^other/demo.yaml: no such config file"):
        read_yaml("other/demo.yaml")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.yaml").write_text("mine: 1\n")
    assert read_yaml("configs/demo.yaml") == {"mine": 1}


def test_paths_that_are_no_config(tmp_path):
    (tmp_path / "demo.yaml").write_text("a: 1\n")
    with pytest.raises(BadInput, match=r"demmo.yaml: no such config file; did you mean .*demo\.yaml"):
        read_yaml(tmp_path / "demmo.yaml")
    with pytest.raises(BadInput, match="is a folder"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")


# -- overrides --------------------------------------------------------------------------------------------------------


def test_overrides_parse_as_yaml_and_leave_the_original_alone():
    mapping = {"a": {"b": 1}, "c": 2}
    assert apply_overrides(mapping, ["a.b=1e-3", "a.d=[1, 2]", "e.f=no", "c=null", "g=a=b"]) == {
        "a": {"b": 1e-3, "d": [1, 2]}, "c": None, "e": {"f": "no"}, "g": "a=b",
    }  # fmt: skip
    assert mapping == {"a": {"b": 1}, "c": 2}


@pytest.mark.parametrize("text", ["a.b", "=1", "a..b=1", ".a=1", "a.=1", ""])
def test_malformed_overrides_show_the_form(text):
    with pytest.raises(BadInput, match="expected key.path=value") as caught:
        apply_overrides({}, [text])
    one_line(caught)


# -- dataclasses ------------------------------------------------------------------------------------------------------


def test_defaults_nested_values_and_conversions():
    made = to_dataclass(Outer, {"pair": [0, 1], "inner": {"rate": 2}, "sizes": [1, 2], "channels": "all"})
    assert made == Outer(pair=(0.0, 1.0), inner=Inner(rate=2.0), sizes=[1, 2], channels="all")
    assert type(made.inner.rate) is float and type(made.pair) is tuple
    assert to_dataclass(Outer, {"inner": None}) == Outer()


@pytest.mark.parametrize(
    "mapping, words",
    [
        ({"nmae": "b"}, ["unknown key nmae", "Did you mean name?"]),
        ({"inner": {"widht": 1}}, ["unknown key inner.widht", "Did you mean inner.width?"]),
        ({"qqqqq": 1}, ["unknown key qqqqq", "Known here: name, on"]),
        ({"name": 3}, ["name: expected text, got 3"]),
        ({"on": "no"}, ['on: expected true or false, got "no"']),
        ({"on": 1}, ["on: expected true or false, got 1"]),
        ({"kind": "z"}, ["kind: expected one of x, y"]),
        ({"channels": "some"}, ["channels: expected a whole number or one of all"]),
        ({"channels": True}, ["channels: expected a whole number"]),
        ({"inner": {"width": 2.5}}, ["inner.width: expected a whole number, got 2.5"]),
        ({"inner": {"width": "8"}}, ["inner.width", "remove the quotes"]),
        ({"inner": {"rate": "1e-4"}}, ["inner.rate: expected a number", "remove the quotes"]),
        ({"inner": {"rate": float("inf")}}, ["inner.rate: expected a number"]),
        ({"inner": {"rate": float("nan")}}, ["inner.rate: expected a number"]),
        ({"inner": {"width": None}}, ["inner.width: expected a whole number, got None"]),
        ({"inner": {"width": 0}}, ["inner.width: must be above 0, got 0"]),
        ({"inner": [1]}, ["inner: expected a group of keys"]),
        ({"pair": [1]}, ["pair: expected a list"]),
        ({"pair": [0, "b"]}, ["pair[1]: expected a number"]),
        ({"sizes": [1, "b"]}, ["sizes[1]: expected a whole number"]),
        ({"sizes": 3}, ["sizes: expected a list, got 3"]),
        ({"free": 3}, ["free: expected a group of keys"]),
        ({"name": "x" * 500, "inner": {"width": "y" * 500}}, ["inner.width"]),
    ],
)
def test_mistakes_name_the_key_and_what_was_expected(mapping, words):
    with pytest.raises(BadInput) as caught:
        to_dataclass(Outer, mapping)
    message = one_line(caught)
    assert all(word in message for word in words), message
    assert len(message) < 200


def test_a_key_without_default_must_be_given():
    with pytest.raises(BadInput, match="group.path: missing; set it"):
        to_dataclass(Needs, {}, "group.")


def test_mapping_and_flatten_are_the_dataclass_in_plain_values():
    config = Outer(pair=(0.0, 1.0), free={"k": [1]})
    mapping = to_mapping(config)
    assert mapping["pair"] == [0.0, 1.0] and to_dataclass(Outer, mapping) == config
    assert flatten(mapping)["inner.width"] == 4 and flatten({"a": {}, "b": {"c": {"d": 1}}}) == {"a": {}, "b.c.d": 1}
    assert set(flatten(mapping)) >= {f.name for f in dataclasses.fields(Outer)} - {"inner", "free"}


# -- groups in a list -------------------------------------------------------------------------------------------------

LISTED = {"parts": [{"name": "a", "width": 1}, {"name": "b", "width": 2}], "sizes": [1, 2]}


def test_a_group_in_a_list_goes_by_its_name():
    changed = apply_overrides(LISTED, ["parts.b.width=3"])
    assert changed["parts"] == [{"name": "a", "width": 1}, {"name": "b", "width": 3}] and LISTED["parts"][1]["width"] == 2
    assert flatten(changed) == {"parts.a.name": "a", "parts.a.width": 1, "parts.b.name": "b", "parts.b.width": 3, "sizes": [1, 2]}
    assert flatten({"parts": [{"name": "a"}, {}], "none": []}) == {"parts": [{"name": "a"}, {}], "none": []}


@pytest.mark.parametrize("override, words", [
    ("parts.c.width=3", "parts.c.width: no 'c' in the list; it has a, b"), ("parts.a=3", "parts.a: stands in a list; give the whole list"),
    ("sizes.0=3", "sizes.0: stands in a list"), ("sizes.0.x=3", "sizes.0.x: no '0' in the list; it has no groups with names"),
])  # fmt: skip
def test_an_override_of_what_a_list_does_not_have_is_refused(override, words):
    with pytest.raises(BadInput) as caught:
        apply_overrides(LISTED, [override])
    assert words in one_line(caught)


def test_a_number_that_no_float_can_hold_is_refused():
    with pytest.raises(BadInput, match="rate: expected a number, got 9999"):
        to_dataclass(Inner, {"rate": int("9" * 400)})
