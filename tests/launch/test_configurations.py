"""Each file of accelerate_configs/ and ds_configs/ is what Accelerate and DeepSpeed take it for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in (ROOT / "accelerate_configs").glob("*.yaml")}
LAYOUTS = {path.stem: path for path in (ROOT / "ds_configs").glob("*.json")}
ON_GPUS = ("ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload")
ON_CPU = ("cpu", "cpu-2", "cpu-2-zero1", "cpu-2-zero2", "cpu-2-zero3")
ONLY_SEVERAL = {"num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port", "rdzv_backend"}


def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(CONFIGS[name].read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def layout(name: str) -> dict[str, Any]:
    return json.loads(LAYOUTS[name].read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_every_way_of_running_is_there() -> None:
    assert set(CONFIGS) == {*ON_CPU, "gpu", *ON_GPUS, *(f"multi-node-{name}" for name in ON_GPUS)}
    assert set(LAYOUTS) == {"zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_accelerate_reads_a_configuration_as_it_is_meant(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(CONFIGS[name]))
    assert isinstance(config, ClusterConfig)
    kind = "DEEPSPEED" if "zero" in name else "NO" if name in ("cpu", "gpu") else "MULTI_GPU"
    assert config.distributed_type == DistributedType(kind)
    assert config.use_cpu == name.startswith("cpu")
    assert config.num_processes == (1 if name in ("cpu", "gpu") else 16 if name.startswith("multi-node-") else 2)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_precision_is_left_to_peftune(name: str) -> None:
    """Without a DeepSpeed file by `no`; with one by silence, as Accelerate refuses the key beside such a file."""
    assert settings(name).get("mixed_precision") == (None if "zero" in name else "no")


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if "zero" in name))
def test_a_configuration_names_the_layout_of_its_own_name_and_nothing_that_belongs_there(name: str) -> None:
    named = settings(name)["deepspeed_config"]
    suffix = name[name.index("zero") :]
    assert named.pop("deepspeed_config_file") == f"ds_configs/{suffix}.json" and suffix in LAYOUTS
    assert set(named) <= {"zero3_init_flag", "deepspeed_multinode_launcher"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_comment_at_the_top_says_how_to_start_it(name: str) -> None:
    head = CONFIGS[name].read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"peftune launch {name.removeprefix('multi-node-')} RECIPE" in head
    if not name.startswith("multi-node-"):
        assert f"accelerate launch --config_file accelerate_configs/{name}.yaml -m peftune train RECIPE" in head


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_form_for_several_machines_differs_only_in_the_rendezvous(name: str) -> None:
    one, several = settings(name), settings(f"multi-node-{name}")
    if "zero" in name:
        assert several["deepspeed_config"].pop("deepspeed_multinode_launcher") == "standard"
    assert several["rdzv_backend"] == "static"
    assert {k: v for k, v in one.items() if k not in ONLY_SEVERAL} == {
        k: v for k, v in several.items() if k not in ONLY_SEVERAL
    }


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_layout_leaves_to_the_recipe_what_the_recipe_says(name: str) -> None:
    config = layout(name)
    sizes = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    assert {config[key] for key in sizes} == {"auto"}
    assert not {"optimizer", "scheduler", "bf16", "fp16"} & config.keys()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_layout_offloads_what_its_name_says(name: str) -> None:
    config = layout(name)
    zero = config["zero_optimization"]
    offload = {"device": "cpu", "pin_memory": True}
    assert zero["stage"] == int(name[4])
    assert zero.get("offload_optimizer") == (offload if "offload" in name else None)
    assert zero.get("offload_param") == (offload if name == "zero3-offload" else None)
    assert config.get("zero_force_ds_cpu_optimizer", True) == ("offload" not in name)


@pytest.mark.filterwarnings("ignore")  # what DeepSpeed warns about at import is its own
@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_accelerate_and_deepspeed_take_a_layout_once_filled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,zero3_init_flag")
    from accelerate import DeepSpeedPlugin
    from deepspeed.runtime.config import DeepSpeedConfig

    plugin = DeepSpeedPlugin(hf_ds_config=str(LAYOUTS[name]), zero3_init_flag=False)
    sizes = {
        "train_micro_batch_size_per_gpu": 4,
        "train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
    }
    plugin.deepspeed_config_process(must_match=False, **sizes)
    plugin.deepspeed_config["steps_per_print"] = 1_000_000
    config = DeepSpeedConfig(plugin.deepspeed_config)
    assert plugin.zero_stage == config.zero_optimization_stage == int(name[4])
    assert config.gradient_clipping == 1.0
    # A key that DeepSpeed does not know would have been kept aside by its model.
    assert not config.zero_config.model_extra
