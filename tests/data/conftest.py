"""A small real corpus (files of the standard library) and what is made of it, once a session."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from corpora import small_recipe

from btx_megatron.data.prepare import prepare
from btx_megatron.recipe import Recipe


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return small_recipe()


@pytest.fixture(scope="session")
def data_folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data folder. Read only: tests share it."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(recipe, folder, lambda phase, done, total: None)
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(data_folder: Path) -> Path:
    """A tokenizer trained on the small corpus."""
    return data_folder / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="session")
def megatron_datasets() -> ModuleType:
    """Megatron's datasets, importable without CUDA."""
    from btx_megatron.runtime import cpu_backend

    cpu_backend.install()
    import megatron.core.datasets.indexed_dataset as indexed_dataset

    return indexed_dataset
