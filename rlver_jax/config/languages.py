"""The languages that prompts are written in.

A new one is an entry here and a folder of its name in `user/prompts` and in `evaluation/prompts`.
"""

LANGUAGES = {"zh": "Chinese, as RLVER's published profiles", "en": "English"}
