"""Every family of transformers that saves and loads dense does so packed: over the whole list of models."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import transformers
from transformers.utils import logging

from tests.helpers.tiny_families import families
from tests.hf.quantization.test_families import round_trip

CHUNKS = 8
PINNED = "5.23.0"
"""The version of transformers that the lists are of; with another one, families may be missing or new."""

NEEDS_PACKAGE = {
    "timm": (
        "edgetam", "edgetam_video", "edgetam_vision_model", "fast_vlm", "gemma3n", "gemma3n_vision", "pe_audio_video",
        "pe_audio_video_encoder", "pe_video", "pe_video_encoder", "perception_lm", "timm_backbone", "timm_wrapper",
    ),
    "natten": ("dinat",),
    "torchaudio": ("higgs_audio_v2_tokenizer",),
    "detectron2": ("layoutlmv2",),
}  # fmt: skip
"""Families that need a package which the tests do not install."""

NOT_JUDGED = {
    "cohere_compass": "cannot be built: its default has no rotary parameters for its layer types",
    "cohere_compass_text": "cannot be built: its default has no rotary parameters for its layer types",
    "d_fine": "cannot be built: its default backbone has fewer stages than it reads when it is small",
    "dbrx": "cannot be built: its config of attention has no rope_theta (a fault of transformers)",
    "diffusion_gemma": "cannot be built: sizes that default to None",
    "ernie4_5_vl_moe": "cannot be built: has 1.3 billion parameters however small its sizes",
    "gemma4_assistant": "cannot be built: its own check refuses its default",
    "gemma4_unified_assistant": "dense: its config has overrides for layers that a small model does not have",
    "maskformer": "cannot be built: its default backbone names stages that a small one does not have",
    "pp_ocrv5_server_det": "cannot be built: a config that defaults to None",
    "pp_ocrv6_medium_det": "cannot be built: a config that defaults to None",
    "qwen2_5_omni": "dense: reads a file of speakers that save_pretrained does not write",
    "qwen3_omni_moe": "cannot be built: its config of the talker lacks an attribute (a fault of transformers)",
    "t5gemma2_encoder": "cannot be built: its config of text lacks an attribute (a fault of transformers)",
    "upernet": "cannot be built: its default backbone has fewer stages than it reads when it is small",
    "vibevoice": "cannot be built: has 1.4 billion parameters however small its sizes",
    "vibevoice_asr": "dense: its own check refuses the chunk size of a small model when its config is read",
    "voxtral_realtime_text": "cannot be built: transformers lists a class that it does not have",
}
"""Families of which dense files say nothing, and why; an entry that is not needed any more is a failure as well."""


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_families_that_load_dense_load_packed(chunk: int, tmp_path: Path) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    not_judged, failed = {}, {}
    for kind in families()[chunk::CHUNKS]:
        try:
            reason = round_trip(kind, tmp_path / kind)
        except Exception as error:  # noqa: BLE001  all families that fail are named, not the first one
            failed[kind] = f"{type(error).__name__}: {error}"
        else:
            if reason is not None:
                not_judged[kind] = " ".join(reason.split())[:300]
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
    assert not failed, f"these families load dense, and fail packed: {failed}"
    if transformers.__version__ == PINNED:
        missing = {
            kind for name, kinds in NEEDS_PACKAGE.items() if not importlib.util.find_spec(name) for kind in kinds
        }
        with_package = {kind for kinds in NEEDS_PACKAGE.values() for kind in kinds} - missing
        expected = {kind for kind in (*NOT_JUDGED, *missing) if kind in families()[chunk::CHUNKS]}
        found = not_judged.keys() - with_package
        assert found == expected, f"reasons of today: { {kind: not_judged.get(kind) for kind in found ^ expected} }"


def test_lists_name_families_of_transformers() -> None:
    if transformers.__version__ == PINNED:
        named = [*NOT_JUDGED, *(kind for kinds in NEEDS_PACKAGE.values() for kind in kinds)]
        assert len(named) == len(set(named))
        assert set(named) <= set(families())
