"""A run of a store by its id or its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssam_scale.errors import UserError
from ssam_scale.tracking.find import find_run
from ssam_scale.tracking.store import open_store
from tests.support.stores import put_store


def test_by_id_or_name_and_what_else_there_is(tmp_path: Path) -> None:
    put_store(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = open_store(uri, create=False)
    experiment = client.create_experiment("pets")
    made = [client.create_run(experiment, run_name=name).info.run_id for name in ("cats", "dogs", "dogs", "owl's")]
    client.log_param(made[0], "checkpoint.directory", "kept/cats")
    for wanted in ("cats", made[0]):
        found = find_run(uri, "pets", wanted)
        assert (found.id, found.name) == (made[0], "cats")
        assert found.params["checkpoint.directory"] == "kept/cats"
    assert find_run(uri, "pets", "owl's").id == made[3]
    for wanted, experiment_name, said in (
        ("dogs", "pets", "2 of experiment 'pets' of .* are called so; give an id: "),
        ("cat", "pets", "none of experiment 'pets' of .* is called so; there are 'cats'"),
        ("cats", "pet", "no experiment 'pet' in .*; did you mean 'pets'?"),
        ("0" * 32, "pets", "has none of this id"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            find_run(uri, experiment_name, wanted)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"none.db"):
        find_run(f"sqlite:///{tmp_path}/none.db", "pets", "cats")
    assert not (tmp_path / "none.db").exists()
