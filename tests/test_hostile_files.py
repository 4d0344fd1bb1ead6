"""What SECURITY.md promises of files from elsewhere: of their paths, sizes and time."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hqqlora
from hqqlora import BaseQuantizeConfig, HQQLinear

# ---- paths that a file names -------------------------------------------------------------


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A model's weights beside the folder that is read, not in it."""
    path = tmp_path / "secret.safetensors"
    save_file({"a.weight": torch.full((4, 4), 7.0)}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    save_file({"b.weight": torch.ones(4, 4)}, tmp_path / "model/one.safetensors")
    return tmp_path / "model"


def put_index(folder: Path, name: str) -> None:
    places = {"b.weight": "one.safetensors", "a.weight": name}
    text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(text)


OUTSIDE = ["../secret.safetensors", "{}/secret.safetensors", "x/../../secret.safetensors", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_leads_to_no_file_outside_its_folder(
    name: str, folder: Path, secret: Path
) -> None:
    from hqqlora.command.checkpoint_folder import open_checkpoint, weight_files
    from hqqlora.command.errors import UsageError
    from hqqlora.distributed.dense_checkpoint import DenseCheckpoint

    name = name.format(secret.parent)
    (folder / "x").mkdir()
    put_index(folder, name)
    for read in (weight_files, lambda f: open_checkpoint(str(f))):
        with pytest.raises(UsageError, match="which its index names") as caught:
            read(folder)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="which is not in its folder"):
        DenseCheckpoint(folder)
    put_index(folder, "one.safetensors")
    assert len(DenseCheckpoint(folder).keys()) == 2


def test_a_name_longer_than_the_system_allows_is_a_file_that_is_missing(folder: Path) -> None:
    from hqqlora.command.checkpoint_folder import weight_files
    from hqqlora.command.errors import UsageError

    put_index(folder, "x" * 10_000)
    with pytest.raises(UsageError, match=r"lacks x+, which its index names"):
        weight_files(folder)


def test_transformers_is_led_to_no_quantized_layer_outside_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tiny_models import save_tiny, tiny_llama

    dense = save_tiny(tiny_llama(num_hidden_layers=1), tmp_path / "dense")
    config = hqqlora.HqqConfig(nbits=4, group_size=32)
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    file.rename(tmp_path / "outside.safetensors")
    places = dict.fromkeys(
        load_file(tmp_path / "outside.safetensors"), "../outside.safetensors"
    )
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (tmp_path / "saved/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError), match="outside"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_links_to_files_outside_the_folder_are_not_copied(folder: Path, tmp_path: Path) -> None:
    from hqqlora.command.checkpoint_folder import open_checkpoint
    from hqqlora.command.errors import UsageError

    (folder / "one.safetensors").rename(folder / "model.safetensors")
    (tmp_path / "id_rsa").write_text("private")
    (folder / "vocab.txt").write_text("a")
    (folder / "merges.txt").symlink_to("vocab.txt")
    checkpoint = open_checkpoint(str(folder))
    assert [path.name for path in checkpoint.other_files()] == ["merges.txt", "vocab.txt"]
    (folder / "LICENSE").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(UsageError, match=r"LICENSE is a link to .*id_rsa, outside"):
        checkpoint.other_files()


def test_links_within_a_cache_of_downloads_are_copied(folder: Path, tmp_path: Path) -> None:
    """Whose snapshots are links to blobs beside them."""
    from hqqlora.command.checkpoint_folder import open_checkpoint

    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    folder.rename(cache / "snapshots/0123")
    folder = cache / "snapshots/0123"
    (folder / "one.safetensors").rename(cache / "blobs/beef")
    (folder / "model.safetensors").symlink_to("../../blobs/beef")
    (cache / "blobs/cafe").write_text("a")
    (folder / "vocab.txt").symlink_to("../../blobs/cafe")
    checkpoint = open_checkpoint(str(folder))
    assert [path.name for path in checkpoint.other_files()] == ["vocab.txt"]


def layer() -> HQQLinear:
    return HQQLinear(nn.Linear(32, 24), BaseQuantizeConfig(nbits=4, group_size=16))


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "fc/../../x", "fc\0"])
def test_names_in_an_adapter_are_names_of_modules_only(name: str, tmp_path: Path) -> None:
    model = hqqlora.add_lora(nn.ModuleDict({"fc": layer()}), r=2)
    hqqlora.save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    tensors = {
        key.replace(".fc.", f".{name}."): tensor for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    config = tmp_path / "adapter/adapter_config.json"
    values = json.loads(config.read_text())
    values.update(base_model_name_or_path=name, target_modules=[name], revision=name)
    config.write_text(json.dumps(values))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="has no module"):
        hqqlora.load_adapter(nn.ModuleDict({"fc": layer()}), tmp_path / "adapter")
    assert sorted(tmp_path.rglob("*")) == before


def test_saving_an_adapter_follows_no_link_out_of_its_folder(tmp_path: Path) -> None:
    model = hqqlora.add_lora(nn.ModuleDict({"fc": layer()}), r=2)
    hqqlora.save_adapter(model, tmp_path / "adapter")
    (tmp_path / "mine").write_text("mine")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).unlink()
        (tmp_path / "adapter" / name).symlink_to("../mine")
    hqqlora.save_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "mine").read_text() == "mine"
    hqqlora.load_adapter(nn.ModuleDict({"fc": layer()}), tmp_path / "adapter")


def test_a_gguf_file_names_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and the model itself may be called anything: no file of that name is touched."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    from gguf_files import write_model

    from hqqlora.gguf.container import GGUFFile

    path = write_model(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    name = b"blk.0.attn_q.weight"
    hostile = b"../../../../a/b.weig"[: len(name)]
    path.write_bytes(content.replace(name, hostile, 1))
    assert hostile.decode() in GGUFFile(path).tensors
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"lacks the tensor|holds tensors|no place for"):
        hqqlora.load_gguf(path, progress=False)
    assert sorted(tmp_path.rglob("*")) == before


# ---- sizes that a file claims ------------------------------------------------------------


@pytest.fixture
def little_memory() -> Iterator[None]:
    """4 GB more of address space than now: who believes a claim of more fails."""
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("little_memory")
class TestSizes:
    def test_a_bytearray_of_any_length(self, tmp_path: Path) -> None:
        """weights_only lets a file call bytearray(10**12)."""
        import pickle
        import zipfile

        from hqqlora.torch_files import read_torch

        class Claim:
            def __reduce__(self) -> tuple[object, ...]:
                return bytearray, (10**12,)

        for protocol in (2, 0):
            pickled = pickle.dumps({"a": Claim()}, protocol=protocol)
            with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
                archive.writestr("archive/data.pkl", pickled)
                archive.writestr("archive/version", "3")
                archive.writestr("archive/byteorder", "little")
            with pytest.raises(ValueError, match="it makes a bytearray"):
                read_torch(tmp_path / "a.pt")
            torch.save({"a": Claim()}, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
            with pytest.raises(ValueError, match="it makes a bytearray"):
                read_torch(tmp_path / "b.pt")

    def test_a_compressed_archive(self, tmp_path: Path) -> None:
        """10 MB of zeros in 10 kB; it could be any amount."""
        import zipfile

        from hqqlora.torch_files import read_torch

        torch.save({"a": torch.zeros(2_500_000)}, tmp_path / "a.pt")
        with (
            zipfile.ZipFile(tmp_path / "a.pt") as source,
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as target,
        ):
            for name in source.namelist():
                target.writestr(name, source.read(name))
        assert (tmp_path / "b.pt").stat().st_size < 20_000
        with pytest.raises(ValueError, match="is compressed"):
            read_torch(tmp_path / "b.pt")

    def test_a_view_that_repeats_its_elements(self, tmp_path: Path) -> None:
        from hqqlora.torch_files import read_torch

        torch.save({"a": {"W_q": torch.ones(1).expand(2**40)}}, tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 2000
        for mmap in (False, True):
            with pytest.raises(ValueError, match=r"tensor \[1099511627776\] .* has 4 bytes"):
                read_torch(tmp_path / "a.pt", mmap=mmap)

    def test_scales_and_zeros_that_multiply_each_other(self) -> None:
        """hqq's quantized zeros are codes, scale and zero: two vectors would make a matrix."""
        state = {**layer().state_dict()}
        zero = state.pop("zero")
        meta = {"nbits": 8, "scale": torch.ones(10**6, 1), "zero": torch.ones(1, 10**6)}
        state |= {"zero_q": zero.to(torch.uint8), "meta_zero": meta}
        with pytest.raises(ValueError, match="not hqq's 8-bit form"):
            layer().load_state_dict(state)

    def test_metadata_as_large_as_weights(self) -> None:
        for key in ("shape", "packing", "compute_dtype"):
            state = layer().state_dict()
            state[key] = torch.zeros(10**8, dtype=torch.uint8)
            with pytest.raises(ValueError, match=r"\[100000000\]"):
                layer().load_state_dict(state)

    def test_a_gguf_list_of_any_length(self, tmp_path: Path) -> None:
        pytest.importorskip("gguf")
        from hqqlora.gguf.container import GGUFFile

        def write(count: int, body: bytes) -> Path:
            key = b"general.list"
            header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
            entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 0, count)
            (tmp_path / "a.gguf").write_bytes(header + entry + body)
            return tmp_path / "a.gguf"

        with pytest.raises(ValueError, match=r"a list of \d+ elements does not fit in its"):
            GGUFFile(write(2**60, b""))
        with pytest.raises(ValueError, match="has lists of 5000000 elements"):
            GGUFFile(write(5_000_000, bytes(5_000_000)))

    def test_a_gguf_tensor_of_many_dimensions(self, tmp_path: Path) -> None:
        """Whose product alone would take hours."""
        pytest.importorskip("gguf")
        from hqqlora.gguf.container import GGUFFile

        count = 500_000
        header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
        tensor = struct.pack("<Q", 1) + b"a" + struct.pack("<I", count) + b"\xff" * (8 * count)
        path = tmp_path / "a.gguf"
        path.write_bytes(header + tensor + struct.pack("<IQ", 0, 0) + bytes(64))
        with pytest.raises(ValueError, match="has 500000 dimensions"):
            GGUFFile(path)

    def test_a_safetensors_header_of_many_numbers(self, tmp_path: Path) -> None:
        from hqqlora.command.safetensors_file import read_header

        for entry in (
            {"dtype": "F32", "shape": [2**62] * 300_000, "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [10**400], "data_offsets": [0, 4]},
            {"dtype": "F32", "shape": [], "data_offsets": [0, 1, 2]},
        ):
            header = json.dumps({"a": entry}).encode()
            (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
            with pytest.raises(ValueError, match="no valid safetensors header"):
                read_header(tmp_path / "a")
        deep = b"[" * 10**6
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(deep)) + deep)
        with pytest.raises(ValueError, match="no valid safetensors header"):
            read_header(tmp_path / "a")


# ---- time that a file claims -------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(.*)*", "(a|a)*b", "(a?){40}a{40}", "a?" * 30, ".*a.*b.*c.*d.*e"),
        *("(" * 500, "x" * 2000, r"((a|b)\2?)+", "(?=(a+)+)b", "(a|a)" * 40),
    ],
    ids=range(11),
)
def test_a_pattern_that_takes_forever_is_refused(pattern: str, tmp_path: Path) -> None:
    model = hqqlora.add_lora(nn.ModuleDict({"fc": layer()}), r=2)
    hqqlora.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {pattern: 2}}))
    with pytest.raises(ValueError, match=r"rank_pattern.*(could take forever|not a regular)"):
        hqqlora.load_adapter(nn.ModuleDict({"fc": layer()}), tmp_path / "adapter")


@pytest.mark.parametrize(
    "pattern",
    [
        *("q_proj", r"^model\.layers\.3\.mlp\.up_proj", r".*\.q_proj", r"layers\.\d+\.mlp"),
        r"(?:.*\.)?layers\.(?:[0-9]|1[0-5])\.(mlp|attn)\.(up|down|gate)_proj",
    ],
)
def test_patterns_as_people_write_them_are_taken(pattern: str) -> None:
    from hqqlora.pattern_cost import check_cost

    check_cost(pattern, "rank_pattern")
