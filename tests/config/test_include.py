"""A configuration that begins from others: the same as one file that says it all, and each key's place is known."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.config.include import read
from ssam_scale.config.load import dump, load, load_with_origins
from ssam_scale.errors import UserError
from tests.support.configs import SMALL
from tests.support.runs import ssam_scale


def write(folder: Path, **files: str) -> Path:
    """Files by name, of which the first is returned; `SMALL` is there as small.yaml."""
    (folder / "small.yaml").write_text(SMALL)
    for name, text in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return folder / f"{next(iter(files))}.yaml"


def test_a_file_says_what_it_has_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path, run="include: small.yaml\noptimizer:\n  lr: 0.3\ntrain: {seed: 7}\n")
    assert load(path) == load(tmp_path / "small.yaml", ["optimizer.lr=0.3", "train.seed=7"])
    assert load(path, ["optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_later_files_replace_earlier_ones(tmp_path: Path) -> None:
    """Each relative to the file that includes it, in a folder of its own too; lists are values."""
    path = write(
        tmp_path,
        run="include: [small.yaml, parts/a.yaml, parts/b.yaml]\noptimizer: {momentum: 0.3}\n",
        **{
            "parts/a": "optimizer: {lr: 0.2, weight_decay: 0.1, momentum: 0.1}\ndata: {mean: [0.1, 0.2, 0.3]}\n",
            "parts/b": "include: c.yaml\noptimizer: {lr: 0.4}\n",
            "parts/c": "optimizer: {lr: 0.5, momentum: 0.2}\ndata: {mean: [0.4, 0.5, 0.6]}\n",
        },
    )
    config = load(path)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.momentum) == (0.4, 0.1, 0.3)
    assert config.data.mean == (0.4, 0.5, 0.6)


def test_a_section_of_another_kind_begins_anew(tmp_path: Path) -> None:
    """What a depth mask says is not for an element mask; a section that is off, or of the same kind, is added to."""
    path = write(tmp_path, run="include: small.yaml\nperturbation: {mask: {pattern: element, sparsity: 0.5}}\n")
    mask, rho = load(path).perturbation.mask, load(path).perturbation.rho
    assert (mask.pattern, mask.sparsity, rho) == ("element", 0.5, 0.2)
    path = write(tmp_path, run="include: small.yaml\nperturbation: {mask: {policy: fixed, cut: 0.5}}\n")
    assert load(path).perturbation.mask.model_dump(exclude_unset=True) == {
        "pattern": "depth", "policy": "fixed", "cut": (0.5, 0.5)
    }  # fmt: skip
    path = write(tmp_path, run="include: small.yaml\nperturbation: {mask: {cut: [0.0, 1.0]}}\n")
    assert load(path).perturbation.mask.cut == (0.0, 1.0)
    path = write(tmp_path, run="include: small.yaml\nperturbation: {preset: msam}\n")
    write(tmp_path, alone=SMALL.partition("perturbation:")[0] + "perturbation: {preset: msam}\n")
    assert load(path).perturbation == load(tmp_path / "alone.yaml", ["train.epochs=1"]).perturbation
    path = write(
        tmp_path, run="include: off.yaml\nperturbation: {rho: 0.3}\n", off="include: small.yaml\nperturbation: null\n"
    )
    assert load(tmp_path / "off.yaml").perturbation is None
    assert load(path).perturbation.model_dump(exclude_unset=True) == {"rho": 0.3}


VALUES = st.one_of(st.none(), st.integers(0, 9), st.lists(st.integers(0, 3), max_size=2))
TREES = st.dictionaries(
    st.sampled_from("abc"), st.recursive(VALUES, lambda t: st.dictionaries(st.sampled_from("xy"), t))
)


def merged(values: list[Any]) -> Any:
    """The slow way: a key's value is the last one's, or all the sections' behind the last that is no section."""
    *_, last = values
    if not isinstance(last, dict):
        return last
    since = max((i + 1 for i, value in enumerate(values) if not isinstance(value, dict)), default=0)
    sections = values[since:]
    return {
        key: merged([s[key] for s in sections if key in s]) for key in dict.fromkeys(k for s in sections for k in s)
    }


def paths(values: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    items = values.items() if isinstance(values, Mapping) else enumerate(values) if isinstance(values, list) else ()
    return {path}.union(*(paths(value, (*path, key)) for key, value in items))


@given(trees=st.lists(TREES.filter(bool), min_size=1, max_size=4))
def test_sections_of_several_files(trees: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever they hold, every key is where the last file that gives it has it, and stands in a line of that file."""
    folder = tmp_path_factory.mktemp("files")
    for index, tree in enumerate(trees):
        (folder / f"{index}.yaml").write_text(json.dumps(tree))
    (folder / "all.yaml").write_text(json.dumps({"include": [f"{index}.yaml" for index in range(len(trees))]}))
    values, origins = read(folder / "all.yaml", "a file", "a folder")
    assert values == merged(trees)
    assert origins.keys() == paths(values)


def test_print_config_says_where_each_key_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path,
        run="""\
            include: small.yaml
            optimizer:
              lr: 0.3
            model: {kwargs: {stem_width: 16}}
            perturbation: {preset: ssam-f}
            """,
    )
    assert (
        ssam_scale(
            "train", "--config", path, "train.seed=3", "tracking.uri=postgresql://me:secret@host/runs", "--print-config"
        )
        == 0
    )
    text = capsys.readouterr().out
    lines = {line.partition(":")[0].strip(): line for line in text.splitlines()}
    for key, where in {
        "lr": f"{path}:3",
        "batch_size": f"{tmp_path / 'small.yaml'}:{1 + SMALL[: SMALL.index('batch_size')].count(chr(10))}",
        "stem_width": f"{path}:4",
        "seed": "override",
        "uri": "override",
        "preset": f"{path}:5",
        "sparsity": "preset ssam-f",
    }.items():
        assert lines[key].endswith(f"[{where}]"), lines[key]
    assert not lines["weight_decay"].endswith("]")  # nobody has given it
    assert "secret" not in text
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert load(copy) == load(path, ["train.seed=3", f"tracking.uri={load(copy).tracking.uri}"])


def test_a_comment_is_one_line_whatever_was_given(tmp_path: Path) -> None:
    odd = tmp_path / "a\nb: c"
    odd.mkdir()
    path = write(odd, run="include: small.yaml\n")
    overrides = ["tracking.run_name='a\n\n  b'"]
    config, origins = load_with_origins(path, overrides)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config, origins=origins))
    assert load(copy) == config


@pytest.mark.parametrize(
    ("run", "others", "message"),
    [
        ("include: smal.yaml", {}, "run.yaml:1: include: smal.yaml: no such file; the nearest in . are small.yaml"),
        ("include: no/a.yaml", {}, "run.yaml:1: include: no/a.yaml: no such file: there is no folder no"),
        ("\ninclude: 3", {}, "run.yaml:2: include: must be a file's name or a list of them, given 3"),
        ("include: []", {}, "run.yaml:1: include: must be a file's name or a list of them, given []"),
        ("include: [a, null]", {}, 'run.yaml:1: include: must be a file\'s name or a list of them, given ["a", null]'),
        ("include:\n- small.yaml\n- .", {}, "run.yaml:3: include: .: is a folder; give the YAML file of a run"),
        ('include: "a\\0"', {}, r"run.yaml:1: include: 'a\x00': is no file that can be read"),
        ("include: $NONE/a", {}, "run.yaml:1: include: '$NONE/a': is no file that can be read: the environment"),
        ("include: ~nobody-here/a", {}, "run.yaml:1: include: ~nobody-here/a: no such file"),
        ("include: run.yaml", {}, "run.yaml:1: include: run.yaml: includes itself, by way of "),
        (
            "include: a.yaml",
            {"a": "include: b.yaml", "b": "x: 1\ninclude: a.yaml"},
            "run.yaml:1: include: a.yaml:1: include: b.yaml:2: include: a.yaml: includes itself, by way of ",
        ),
        ("include: a.yaml", {"a": ""}, "run.yaml:1: include: a.yaml: is empty; start from one of the files"),
        ("include: a.yaml", {"a": "- 1"}, "run.yaml:1: include: a.yaml:1: a configuration is a section with keys"),
        ("include: a.yaml", {"a": "x: ["}, "run.yaml:1: include: a.yaml: not YAML"),
        # a mistake in what is included is told where it stands
        (
            "include: [small.yaml, a.yaml]",
            {"a": "\noptimizer: {lt: 0.1}"},
            "a.yaml:2: optimizer.lt: unknown key; did you mean optimizer.lr?",
        ),
        ("include: small.yaml\ntrain: {epochs: 0}", {}, "run.yaml:2: train.epochs: must be greater than or equal to 1"),
        ("include: small.yaml\noptimizer: {include: x}", {}, "run.yaml:2: optimizer.include: unknown key"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(
    run: str, others: dict[str, str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, run=run, **others)
    with pytest.raises(UserError) as raised:
        load(Path("run.yaml"))
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("a.yaml")
    with pytest.raises(UserError, match=r"run\.yaml:1: include: .*a\.yaml"):
        load(write(tmp_path, run="include: a.yaml"))


def test_files_that_include_others_twice(tmp_path: Path) -> None:
    """Forty of them would be read 2⁴⁰ times."""
    files = {f"f{index}": f"include: [f{index + 1}.yaml, f{index + 1}.yaml]\n" for index in range(40)}
    path = write(tmp_path, **files, f40="x: 1\n")
    with pytest.raises(UserError, match=r"more than 64 files are included"):
        load(path)


def test_an_override_includes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, run="include: small.yaml\n")
    with pytest.raises(UserError, match=r"override include=small.yaml: files are included by files; give --config one"):
        load(path, ["include=small.yaml"])
