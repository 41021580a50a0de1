"""The families' own processors, saved and loaded: from a picture file and a question to an answer."""

import pytest
import transformers

from test_luvc import IMAGE, LUVC, SIDE, TILES, tiny

# family -> (its processor, image processor and video processor, and settings of these for the tiny model)
QWEN_PIXELS = {"patch_size": 4, "merge_size": 2, "min_pixels": 64 * 64, "max_pixels": 96 * 96}
SQUARE = {"height": 24, "width": 24}
IDEFICS = {"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 48}}
CLIP = (
    {"size": {"shortest_edge": 24}, "crop_size": SQUARE},
    {"patch_size": 4, "num_additional_image_tokens": 1},
)
PROCESSORS = {
    "llava-clip": ("Llava", "CLIP", "", *CLIP),
    "llava_next": ("LlavaNext", "LlavaNext", "", CLIP[0] | TILES, CLIP[1]),
    "llava_onevision": ("LlavaOnevision", "LlavaOnevision", "LlavaOnevision", {"size": SQUARE, **TILES},
                        {"num_image_tokens": SIDE**2}),
    "internvl": ("InternVL", "GotOcr2", "InternVL",
                 {"size": {"height": 48, "width": 48}, "crop_to_patches": True, "max_patches": 4},
                 {"image_seq_length": SIDE**2}),
    "idefics3": ("Idefics3", "Idefics3", "", IDEFICS, {"image_seq_len": SIDE**2}),
    "smolvlm": ("SmolVLM", "SmolVLM", "SmolVLM", IDEFICS, {"image_seq_len": SIDE**2}),
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", "Qwen2VL", QWEN_PIXELS, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2VL", "Qwen2VL", QWEN_PIXELS, {}),
    "qwen3_vl": ("Qwen3VL", "Qwen2VL", "Qwen3VL", QWEN_PIXELS, {}),
}  # fmt: skip
SPECIAL = {  # token ids 60 to 63: picture, video, start, end
    "internvl": ["<IMG_CONTEXT>", "<video>", "<img>", "</img>"],
    "qwen": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "": ["<image>", "<video>", "<fake_token_around_image>", "<global-img>"],
}


def save_checkpoint(name, folder):
    """A tiny model of a family and its own processor, with a tokenizer of words made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    processor, image, video, pixels, more = PROCESSORS[name]
    special = next(tokens for key, tokens in SPECIAL.items() if name.startswith(key))
    words = ["<pad>", "<s>", "<unk>", "<end_of_utterance>", "what", "colour", "is", "it", "?", "answer", ":"]
    words += [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words += [f"word{i}" for i in range(len(words), IMAGE)] + special
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    keys = ("context_image_token", "video_token", "start_image_token", "end_image_token")
    named = dict(zip(keys, special, strict=True)) if name == "internvl" else {}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", unk_token="<unk>",
        extra_special_tokens=named or [word for word in words if word[0] == "<"],
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": special} if named else {})
    picture = special[2] + special[0] + special[3] if name.startswith("qwen") else special[0]
    template = "<s>{% for part in messages[0].content %}{% if part.type == 'image' %}" + picture
    template += "{% else %} {{ part.text }} answer : {% endif %}{% endfor %}"
    model = tiny(name)
    image_processor = getattr(transformers, f"{image}ImageProcessorPil")(**pixels)
    parts = {"image_processor": image_processor, "tokenizer": tokenizer}
    if video:
        parts["video_processor"] = getattr(transformers, f"{video}VideoProcessor")()
    if name.startswith("llava"):
        more = more | {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    processor = getattr(transformers, f"{processor}Processor")(**parts, chat_template=template, **more)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", PROCESSORS)
def test_from_a_picture_to_an_answer(name, tmp_path):
    """Catches: inputs that `encode` loses, pictures whose number of tokens is not what the processor writes into the
    prompt, tiles as only processors make them."""
    from PIL import Image

    from toy.ask import encode, load

    try:
        save_checkpoint(name, tmp_path)
    except ImportError as error:
        package = next(package for package in ("torchvision", "num2words") if package in str(error).lower())
        pytest.skip(f"the processor of {name} needs {package}, which does not import here")
    model, processor = load(str(tmp_path))
    inputs = encode(processor, Image.effect_noise((60, 40), 90).convert("RGB"), "what is it ?")
    with LUVC(model) as luvc:
        new = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    full, left = (
        int((inputs["input_ids"] == model.config.image_token_id).sum()),
        [len(row) for (row,) in luvc.kept],
    )
    text = inputs["input_ids"].shape[1] - full
    assert new.shape == (1, 3) and left[-1] == text >= 7
    assert 0 < left[0] - text < 0.8 * full, "the merger left as many tokens as there were"
