"""OpenHermes 2.5: about a million conversations from many sources, most by GPT-4 (Teknium 2023)."""

TRAIN = ("teknium/OpenHermes-2.5", [None], "train")
IGNORE = ("avatarUrl", "custom_instruction", "skip_prompt_formatting", "title", "views")
