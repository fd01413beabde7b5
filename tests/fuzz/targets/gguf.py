"""Read a tiny model's GGUF file with flipped bits, other numbers and cut ends."""

from pathlib import Path

import numpy as np

from fuselm.models import gguf_files


def prepare(folder: Path):
    import gguf

    folder.mkdir()
    path = folder / "whole.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["a", "b", "c", "ab"])
    writer.add_token_types([1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_tensor("token_embd.weight", np.ones((4, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_files._read_gguf(path)
    return path.read_bytes()


def case(made, random: np.random.Generator, folder: Path) -> None:
    data = bytearray(made)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(len(data)))
        way = random.integers(4)
        if way == 0:
            data[at] ^= 1 << int(random.integers(8))
        elif way == 1:
            number = [0, 1, 2**31 - 1, 2**32, 2**62, 2**64 - 1][int(random.integers(6))]
            data[at : at + 8] = number.to_bytes(8, "little")
        elif way == 2 and at > 8:
            del data[at:]
        else:
            data[at : at + 4] = random.bytes(4)
    path = folder / "model.gguf"
    path.write_bytes(data)
    if data[:4] != b"GGUF":
        gguf_files.convert_gguf_file(path)
        raise AssertionError("taken for a GGUF file")
    gguf_files._read_gguf(path)
