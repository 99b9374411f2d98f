"""`accelerate launch` with the config files of `accelerate config`: DDP, FSDP2, tensor parallelism, DeepSpeed, MPI.

The files are written by the class with which `accelerate config` writes them, with the answers of its questionnaire.
accelerate 1.15 takes FSDP on accelerators alone: on a CPU such a run goes on as DDP (asserted below), and the tests of
FSDP itself make it take that path.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import ComputeEnvironment, DistributedType
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer

from hf_sparse import Pruner, RecipeError, SparsityCallback, SparsityConfig, last_checkpoint, sparsify, summarize
from tests.helpers.ranks import LIMIT, ROOT
from tests.helpers.sharded import SCORERS, build
from tests.helpers.training import RAMP, Rows, arguments, bert
from tests.integration.test_fsdp_trainer import NO_DROPOUT, shard_on_a_cpu

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
FSDP: dict[str, Any] = {
    "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "BertLayer",
    "fsdp_cpu_ram_efficient_loading": True, "fsdp_activation_checkpointing": False,
}  # fmt: skip
TENSOR_PARALLEL = {
    "parallelism_config_dp_replicate_size": 1, "parallelism_config_dp_shard_size": 1,
    "parallelism_config_tp_size": 2, "parallelism_config_cp_size": 1,
}  # fmt: skip
ZERO: dict[str, Any] = {
    "offload_optimizer_device": "none", "offload_param_device": "none", "zero3_init_flag": False,
    "gradient_accumulation_steps": 1,
}  # fmt: skip
ANSWERS: dict[str, dict[str, Any]] = {
    "ddp": {"distributed_type": DistributedType.MULTI_GPU},
    "full": {"distributed_type": "FSDP", "fsdp_config": {**FSDP, "fsdp_state_dict_type": "FULL_STATE_DICT"}},
    "sharded": {"distributed_type": "FSDP", "fsdp_config": {**FSDP, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
    "tp": {
        "distributed_type": "FSDP",
        "fsdp_config": {**FSDP, "fsdp_state_dict_type": "SHARDED_STATE_DICT"},
        "parallelism_config": TENSOR_PARALLEL,
    },
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO, "zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {**ZERO, "zero_stage": 2}},
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {**ZERO, "zero_stage": 3, "zero3_save_16bit_model": True},
    },
    "multi-cpu": {"distributed_type": DistributedType.MULTI_CPU, "use_cpu": True},
}


def config_file(folder: Path, kind: str) -> Path:
    """Write what `accelerate config` writes for two processes on one machine."""
    shared: dict[str, Any] = {
        "compute_environment": ComputeEnvironment.LOCAL_MACHINE, "num_processes": 2, "mixed_precision": "no",
        "gpu_ids": "all", "same_network": True, "use_cpu": False, "debug": False, "main_process_port": 0,
    }  # fmt: skip
    ClusterConfig(**{**shared, **ANSWERS[kind]}).to_yaml_file(folder / f"{kind}.yaml")
    return folder / f"{kind}.yaml"


def launched(folder: Path, kind: str, function: str) -> str:
    """Run a function of this module by `accelerate launch`, and return what it printed."""
    script = folder / "worker.py"
    script.write_text(
        f"import pathlib, sys\nfrom {__name__} import {function}\nfrom tests.helpers.ranks import leave\n"
        f"{function}(pathlib.Path(sys.argv[1]), sys.argv[2])\nleave()\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config_file(folder, kind))]
    done = subprocess.run(
        [*command, str(script), str(folder), kind], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def trainer_of(folder: Path, kind: str, scorer: str = "movement", **options: Any) -> Any:
    return Trainer(
        bert(**NO_DROPOUT),
        arguments(
            folder / kind, max_steps=8, optim="sgd", learning_rate=0.1, save_strategy="steps",
            ddp_backend="gloo" if "LOCAL_RANK" in os.environ else None,
            save_steps=4, train_sampling_strategy="sequential", **options,
        ),
        train_dataset=Rows(),
        callbacks=[SparsityCallback(SparsityConfig(sparsity=0.9, scorer=SCORERS[scorer], schedule=RAMP))],
    )  # fmt: skip


def trains(folder: Path, kind: str, scorer: str = "movement") -> None:
    """On each process: train as the config file says, and leave what came of it."""
    trainer = trainer_of(folder, kind, scorer)
    trainer.train()
    trainer.save_model(str(folder / kind / "out"))
    facts = {
        "processes": trainer.args.world_size,
        "type": str(trainer.accelerator.distributed_type),
        "sharded": all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters()),
        "files": sorted(path.name for path in (folder / kind / "checkpoint-4").iterdir()),
    }
    (folder / f"{kind}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))


def trains_sharded(folder: Path, kind: str) -> None:
    """As `trains`, with accelerate made to shard on a CPU."""
    shard_on_a_cpu()
    trains(folder, kind)


def facts_of(folder: Path, kind: str, rank: int = 0) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / f"{kind}-{rank}.json").read_text())
    return facts


@pytest.mark.slow
def test_data_parallel_files(tmp_path: Path) -> None:
    for kind in ("ddp", "full", "sharded"):
        launched(tmp_path, kind, "trains" if kind == "ddp" else "trains_sharded")
        facts = facts_of(tmp_path, kind, 1)
        assert facts["processes"] == 2, kind
        assert facts["type"] == ("DistributedType.MULTI_CPU" if kind == "ddp" else "DistributedType.FSDP")
        assert facts["sharded"] == (kind != "ddp")
        assert ("pytorch_model_fsdp_0" in facts["files"]) == (kind == "sharded")
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ddp" / "out")
    assert summarize(expected).sparsity > 0.85
    for kind in ("full", "sharded"):
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind / "out")
        assert summarize(found) == summarize(expected)
        for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
            assert torch.equal(one != 0, other != 0) or "layer." not in name, name


@pytest.mark.slow
def test_fsdp_file_on_a_cpu_is_ddp_and_is_told(tmp_path: Path) -> None:
    said = launched(tmp_path, "full", "trains")
    facts = facts_of(tmp_path, "full")
    assert (facts["processes"], facts["type"], facts["sharded"]) == (2, "DistributedType.MULTI_CPU", False)
    assert "accelerate shards on GPUs only; on this device the run is plain DDP" in said


@pytest.mark.slow
def test_multi_cpu_file_without_mpi_is_one_process(tmp_path: Path) -> None:
    launched(tmp_path, "multi-cpu", "trains")
    facts = facts_of(tmp_path, "multi-cpu")
    assert (facts["processes"], facts["type"]) == (1, "DistributedType.NO")


IDS = torch.tensor([[1, 2, 3, 4]])


def computes(folder: Path, kind: str) -> None:
    """On each process: load a packed model in parts; new masks on its parts are refused."""
    model = AutoModelForCausalLM.from_pretrained(folder / "packed", tp_plan="auto").eval()
    assert isinstance(model.model.layers[0].mlp.down_proj.weight, DTensor)
    with torch.no_grad():
        torch.save(model(IDS).logits, folder / f"logits-{os.environ['RANK']}.pt")
    with pytest.raises(RecipeError, match=r"is sharded already.*not under tensor parallelism.*Put masks on first"):
        Pruner(model, SparsityConfig(sparsity=0.95)).attach()
    with pytest.raises(ValueError, match="ParallelismConfig is only compatible"):  # on a CPU
        Trainer(model, arguments(folder / "run", ddp_backend="gloo"), train_dataset=Rows())


@pytest.mark.slow
def test_tensor_parallel_file(tmp_path: Path) -> None:
    sparsify(build("llama"), SparsityConfig(sparsity=0.9)).save_pretrained(tmp_path / "packed")
    launched(tmp_path, "tp", "computes")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()(IDS).logits
    for rank in (0, 1):
        found = torch.load(tmp_path / f"logits-{rank}.pt", weights_only=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEEPSPEED, reason="it is about a machine without DeepSpeed")
def test_deepspeed_file_without_deepspeed_is_refused_upstream(tmp_path: Path) -> None:
    given = launch_command_parser().parse_args(["--config_file", str(config_file(tmp_path, "zero2")), "none.py"])
    with pytest.raises(ImportError, match="DeepSpeed is not installed"):
        launch_command(given)


BY_DEEPSPEED = {"zero1": "movement", "zero2": "magnitude", "zero3": "magnitude"}
"""The scorer that each stage is tried with."""


def divides(folder: Path, kind: str) -> None:
    """On each process: as `trains`, by DeepSpeed; then again from the middle."""
    deepspeed: Any = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled at its first use
    scorer = BY_DEEPSPEED[kind]
    if kind == "zero3":
        with pytest.raises(RecipeError, match="scorer 'movement' does not work with DeepSpeed ZeRO-3: it learns"):
            trainer_of(folder, "refused", "movement", use_cpu=False).train()
    for name, resume in ((kind, None), (f"{kind} again", str(folder / kind / "checkpoint-4"))):
        trainer = trainer_of(folder, name, scorer, use_cpu=False)
        assert trainer.is_deepspeed_enabled
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(folder / name / "out"))
    assert last_checkpoint(folder / kind, 2) == str(folder / kind / "checkpoint-8")


@pytest.mark.slow
@pytest.mark.skipif(not DEEPSPEED, reason="needs DeepSpeed")
@pytest.mark.parametrize("kind", BY_DEEPSPEED)
def test_deepspeed_files(tmp_path: Path, kind: str) -> None:
    launched(tmp_path, kind, "divides")
    launched(tmp_path, "ddp", f"trains_{BY_DEEPSPEED[kind]}")
    check_divided(tmp_path, kind)


def check_divided(folder: Path, kind: str) -> None:
    """Compare what came of `divides` with DDP, and with itself resumed from the middle."""
    whole, again = (folder / name / "out" for name in (kind, f"{kind} again"))
    assert (whole / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    expected = AutoModelForSequenceClassification.from_pretrained(folder / "ddp" / "out")
    found = AutoModelForSequenceClassification.from_pretrained(whole)
    assert summarize(found) == summarize(expected)
    assert summarize(found).sparsity > 0.85
    for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(one != 0, other != 0) or "layer." not in name, (kind, name)
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    stopped = AutoModelForSequenceClassification.from_pretrained(folder / kind / "checkpoint-4")
    assert 0.1 < summarize(stopped).sparsity < 0.9


def trains_magnitude(folder: Path, kind: str) -> None:
    """As `trains`, by magnitude."""
    trains(folder, kind, "magnitude")


def trains_movement(folder: Path, kind: str) -> None:
    """As `trains`."""
    trains(folder, kind)
