"""Clusters on disk: numbers as arrays, words as JSON, no pickle, so that reading them runs nothing.

``clusters.json`` also holds each cluster's heaviest words, for whoever opens the folder.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from btx_megatron.durable import write_durably
from btx_megatron.ensembles.clusters import Clusters
from btx_megatron.ensembles.tfidf import TfIdf
from btx_megatron.errors import UserError

_WORDS, _NUMBERS, _VERSION = "clusters.json", "clusters.npz", 1


def save_clusters(clusters: Clusters, folder: Path) -> None:
    """Write both files into a folder that is there; the same clusters give the same bytes."""
    content = {"version": _VERSION, "heaviest_words": clusters.words(), "terms": clusters.tfidf.terms}
    numbers = io.BytesIO()
    np.savez(
        numbers, idf=clusters.tfidf.idf_V, directions=clusters.directions_CV, centres=clusters.centres_KC
    )
    write_durably(folder / _NUMBERS, numbers.getvalue())
    write_durably(folder / _WORDS, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def load_clusters(folder: Path) -> Clusters:
    """Read what ``save_clusters`` wrote; missing, broken or unrelated files raise UserError."""
    try:
        content = json.loads((folder / _WORDS).read_text(encoding="utf-8"))
        version, terms = content["version"], tuple(content["terms"])
        with np.load(folder / _NUMBERS, allow_pickle=False) as file:
            idf, directions, centres = file["idf"], file["directions"], file["centres"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not there; fit the clusters again") from None
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder}: clusters.* cannot be read ({error}); fit the clusters again") from None
    if version != _VERSION:
        raise UserError(f"{folder}: clusters of version {version}, this reads {_VERSION}; fit them again")
    shapes = idf.shape, directions.shape, centres.shape
    if shapes != ((len(terms),), (len(directions), len(terms)), (len(centres), len(directions))):
        raise UserError(f"{folder}: {_WORDS} and {_NUMBERS} are of different fits; fit the clusters again")
    return Clusters(TfIdf(terms, idf), directions, centres)
