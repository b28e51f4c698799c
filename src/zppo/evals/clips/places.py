"""Where a clip lies below a folder: archives are unpacked in many ways, and two clips of a set may have one name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from zppo.errors import UnavailableError

CLIPS = frozenset((".mp4", ".avi", ".webm", ".mkv", ".mov"))
"""Endings of files that are clips."""

_CLEVRER, _PERCEPTION = ("clevrer/video_validation",), ("perception/videos",)
_CHARADES = ("star/Charades_segment", "star/Charades_v1_480")
MVBENCH: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "action_antonym": ("ssv2_video_mp4", "ssv2_video"),
        "action_count": _PERCEPTION,
        "action_localization": ("sta/sta_video_segment", "sta/sta_video"),
        "action_prediction": _CHARADES,
        "action_sequence": _CHARADES,
        "character_order": _PERCEPTION,
        "counterfactual_inference": _CLEVRER,
        "egocentric_navigation": ("vlnqa",),
        "episodic_reasoning": ("tvqa/video_fps3_hq_segment", "tvqa/frames_fps3_hq"),
        "fine_grained_action": ("Moments_in_Time_Raw/videos",),
        "fine_grained_pose": ("nturgbd_convert", "nturgbd"),
        "moving_attribute": _CLEVRER,
        "moving_count": _CLEVRER,
        "moving_direction": _CLEVRER,
        "object_existence": _CLEVRER,
        "object_interaction": _CHARADES,
        "object_shuffle": _PERCEPTION,
        "scene_transition": ("scene_qa/video",),
        "state_change": _PERCEPTION,
        "unexpected_action": ("FunQA_test/test",),
    }
)
"""Folders of MVBench's tasks: on its branch `video`, whose parts of clips are cut already, then as its archives unpack."""

VIDEOMMMU: Mapping[str, str] = MappingProxyType(
    {
        subject: field
        for field, subjects in {
            "Art": "Art Art_Theory Design Music",
            "Business": "Accounting Economics Finance Manage Marketing",
            "Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
            "Mechanical_Engineering",
            "Humanities": "History Literature Sociology Psychology",
            "Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
            "Science": "Biology Chemistry Geography Math Physics",
        }.items()
        for subject in subjects.split()
    }
)
"""Video-MMMU's fields, whose archives and folders hold the clips of their subjects."""


def find_file(path: Path, folder: Path, places: Sequence[str] = ()) -> Path:
    """The file that a row names.

    Args:
        path: where the row says that it is.
        folder: below which it must be.
        places: folders in which the set has it, the first first, wherever below `folder` they were unpacked; then it may have another
            ending of a clip. None: where the row says, else the only file of its name, of several the one in a folder of the same name.

    Raises:
        UnavailableError: there is none, or it is one of several.
    """
    for place in places:
        if (exact := folder / place / path.name).exists():
            return exact
    same = _below(folder, path.name) if folder != Path() else []
    if places:
        others = [found for ending in sorted(CLIPS) for found in _below(folder, path.with_suffix(ending).name)] if path.suffix else []
        fits = (_in_place(some, place) for place in places for some in (same, others))
        same = next((fit for fit in fits if fit), [])
        if not same and path.exists():
            return path
    else:
        if path.exists():
            return path
        same = _in_place(same, path.parent.name) or same
    if len(same) == 1:
        return same[0]
    where = f"{folder} in {' or '.join(places)}" if places else str(folder)
    why = f"{len(same)} files below {where} have its name" if same else f"nor is there a file of its name below {where}"
    raise UnavailableError(f"{path} does not exist, {why}")


def _in_place(paths: Sequence[Path], place: str) -> list[Path]:
    """Those in a folder whose path ends so."""
    parts = PurePosixPath(place).parts
    return [path for path in paths if path.parent.parts[-len(parts) :] == parts] if parts else []


def _below(folder: Path, name: str) -> list[Path]:
    return list(_by_name(folder).get(name, ()))


def look_again() -> None:
    """Forgets what lies below folders: clips may have come."""
    _by_name.cache_clear()


@lru_cache(maxsize=4)
def _by_name(folder: Path) -> Mapping[str, list[Path]]:
    """Everything below a folder by its name, looked through once for a benchmark: there may be thousands of clips."""
    names: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        names.setdefault(path.name, []).append(path)
    return names
