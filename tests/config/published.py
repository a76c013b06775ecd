"""The models of the recipes: the published config.json of each, its parameters, the processes of the
recipe, and a small relative (tests/hf/models.py)."""

_LLAMA31 = {
    "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 152064,
    "use_sliding_window": False, "tie_word_embeddings": False,
}  # fmt: skip
PUBLISHED = {
    "smollm2-135m": (
        {
            "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
            "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
        },
        134_515_008, 2, "smollm2",
    ),
    "qwen2.5-7b-math": (
        _QWEN25 | {
            "rope_theta": 10000.0, "max_position_embeddings": 4096, "sliding_window": 4096,
        },
        7_615_616_512, 8, "qwen2",
    ),
    "qwen2.5-7b-math-ppo": (
        _QWEN25 | {
            "rope_theta": 10000.0, "max_position_embeddings": 4096, "sliding_window": 4096,
        },
        7_615_616_512, 8, "qwen2",
    ),
    "qwen2.5-7b-one-gpu": (
        _QWEN25 | {
            "rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": 131072,
        },
        7_615_616_512, 1, "qwen2",
    ),
    "llama3.1-8b-general": (
        _LLAMA31 | {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        8_030_261_248, 16, "llama3",
    ),
    "llama3.1-70b-math": (
        _LLAMA31 | {
            "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
        70_553_706_496, 64, "llama3",
    ),
}  # fmt: skip
