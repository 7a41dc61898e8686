"""Tiny models with random weights and their tokenizers, and data they can learn, written to a folder."""

import json
import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

GOOD = ["good", "great", "fine", "nice"]
BAD = ["bad", "poor", "awful", "sad"]
OTHER = ["the", "film", "was", "a", "plot", "and", "actor"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tokenizer(*, bert):
    words = SPECIAL + GOOD + BAD + OTHER
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "model_input_names": ["input_ids", "attention_mask"]}
    if bert:
        raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        names.update(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
        names["model_input_names"].append("token_type_ids")
    else:
        names.update(eos_token="[SEP]", bos_token="[CLS]")
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names)


def save(model, folder, *, bert):
    model.save_pretrained(folder)
    tokenizer(bert=bert).save_pretrained(folder)
    return folder


def bert_config(**changes):
    fields = {
        "vocab_size": 24,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return BertConfig(**{**fields, **changes})


def bert(folder, *, classifier=False, **changes):
    """A BERT without a head, as a pretrained one is published; or with one."""
    torch.manual_seed(1)
    model = BertForSequenceClassification if classifier else BertModel
    return save(model(bert_config(**changes)), folder, bert=True)


def llama_config(**changes):
    fields = {
        "vocab_size": 24,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "pad_token_id": None,
    }
    return LlamaConfig(**{**fields, **changes})


def llama(folder, **changes):
    torch.manual_seed(1)
    return save(LlamaForCausalLM(llama_config(**changes)), folder, bert=False)


def gpt2(folder):
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=2, eos_token_id=3)
    return save(GPT2LMHeadModel(config), folder, bert=False)


_SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
_FEWER_KEYS = {**_SIZES, "num_key_value_heads": 1}
_TWO_STACKS = {
    "vocab_size": 50,
    "d_model": 16,
    **{
        f"{stack}_{size}": value
        for stack in ("encoder", "decoder")
        for size, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 24))
    },
}
# Model class and the fields of its config.
FAMILIES = {
    "LlamaForCausalLM": _FEWER_KEYS,
    "Qwen2ForCausalLM": _FEWER_KEYS,
    "Qwen3ForCausalLM": {**_FEWER_KEYS, "head_dim": 8},
    "MistralForCausalLM": _FEWER_KEYS,
    "MixtralForCausalLM": {**_FEWER_KEYS, "num_local_experts": 4},
    "GemmaForCausalLM": {**_FEWER_KEYS, "head_dim": 8},
    "PhiForCausalLM": _SIZES,
    "GPT2LMHeadModel": {
        "vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "OPTForCausalLM": {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "BertForSequenceClassification": _SIZES,
    "RobertaForSequenceClassification": _SIZES,
    "DistilBertForSequenceClassification": {
        "vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    },
    "BartForConditionalGeneration": {**_TWO_STACKS, "max_position_embeddings": 32},
    "ViTForImageClassification": {**_SIZES, "image_size": 8, "patch_size": 4},
    "WhisperForConditionalGeneration": {
        **_TWO_STACKS, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
}  # fmt: skip


def family_model(name, **changes):
    """A model of one of `FAMILIES`, the same each time."""
    torch.manual_seed(1)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**{**FAMILIES[name], **changes}))


def sentences(count, seed=0):
    """(sentence, label) with one telling word; the label is 1 where that word is good."""
    draw = random.Random(seed)
    found = []
    for index in range(count):
        words = draw.choices(OTHER, k=draw.randint(2, 9))
        words.insert(draw.randrange(len(words)), draw.choice((BAD, GOOD)[index % 2]))
        found.append((" ".join(words), index % 2))
    return found


def write_labelled(path, count, seed=0, names=(0, 1)):
    lines = [json.dumps({"text": text, "label": names[label]}) for text, label in sentences(count, seed)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_text(path, count, seed=0):
    path.write_text("\n".join(text for text, _ in sentences(count, seed)) + "\n")
    return path
