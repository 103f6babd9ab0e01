"""Where the model in the box is found, and what is said when it is not there."""

from __future__ import annotations

import pytest

from minivllm.exceptions import ModelFilesError
from minivllm.utils import box_model


def test_the_directory_has_a_config(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(box_model, "_DIRECTORY", tmp_path)
    assert box_model.box_model_path() == tmp_path


def test_an_installation_without_it_says_so_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(box_model, "_DIRECTORY", tmp_path)
    with pytest.raises(ModelFilesError, match="no model in the box .* name a model, or train one"):
        box_model.box_model_path()


def test_the_draft_lies_beside_it(tmp_path, monkeypatch):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    monkeypatch.setattr(box_model, "_DIRECTORY", tmp_path)
    assert box_model.box_draft_model_path() == tmp_path / "draft"
    with pytest.raises(ModelFilesError):
        box_model.box_model_path()
