"""A Llama or Qwen3 checkpoint as a GGUF file in BF16, so that llama.cpp can be measured on the same weights.

    python benchmarks/to_gguf.py MODEL_DIR OUT.gguf      # needs: pip install gguf

For the models of examples/make_random_model.py: byte-level BPE tokenizers. llama.cpp's llama-quantize makes Q8_0 of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    base, kind = name.rsplit(".", 1)
    if base.startswith("model.layers."):
        index, part = base.removeprefix("model.layers.").split(".", 1)
        return f"blk.{index}.{NAMES[part]}.{kind}"
    return f"{NAMES[base]}.{kind}"


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows in the order of rotary pairs (0, 1), (2, 3), …, which llama.cpp's Llama has, from halves, as here."""
    head_dim = weight.shape[0] // num_heads
    return weight.view(num_heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)


def write_hyperparameters(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def write_tokenizer(writer: gguf.GGUFWriter, directory: Path, config: dict) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = {token: index for token, index in tokenizer["model"]["vocab"].items()}
    special = {added["id"] for added in tokenizer["added_tokens"]}
    ids |= {added["content"]: added["id"] for added in tokenizer["added_tokens"]}
    tokens = [token for token, _ in sorted(ids.items(), key=lambda item: item[1])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens)))
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def write_tensors(writer: gguf.GGUFWriter, directory: Path, config: dict) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if config["model_type"] == "llama" and ".q_proj." in name:
                tensor = interleaved(tensor, config["num_attention_heads"])
            if config["model_type"] == "llama" and ".k_proj." in name:
                tensor = interleaved(tensor, config["num_key_value_heads"])
            if tensor.dim() == 1:
                writer.add_tensor(gguf_name(name), tensor.float().numpy())
            else:
                raw = tensor.bfloat16().contiguous().view(torch.uint8).numpy()
                writer.add_tensor(gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    config = json.loads((args.model / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES or config.get("rope_scaling"):
        parser.error(f"model_type {config['model_type']} (or its rope_scaling) is not one this script converts")
    writer = gguf.GGUFWriter(str(args.out), ARCHITECTURES[config["model_type"]])
    write_hyperparameters(writer, config)
    write_tokenizer(writer, args.model, config)
    write_tensors(writer, args.model, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
