"""A made-up clone of SAGE's repository: its structure, with texts of our own."""

from pathlib import Path

SIMULATOR = '''
import random
import nowhere  # importing this file would fail

emo_count = {"Mood-S": 100, "Mood-A": 70, "Mood-B": 40, "Mood-C": 10}
target_prompt = """You came to talk.
* Keep your wish to yourself."""

def call_llm(prompt):
    # to be filled in

    return ret

def planning_reply(player_data):
    template = """Judge the latest words.
# Aim
*{{target}}
Answer as: Content: TargetCompletion: Activity: Analyse: Change:
# Who
{{simulator_role}}
# Where
{{simulator_scene}}
**mood {{emotion}}
**so far
{{dialog_history}}
"""
    history_str = []
    mapping = {"user": "ME", "assistant": "THEM"}
    prompt = template.replace("{{emotion}}", "x")

def player_reply(player_data, planning):
    template = """Say something.
*{{target}}
{{player_type}}
{{player_topic}}
**before
{{dialog_history}}
**latest
{{new_history}}
**thoughts
{{planning}}
**mood {{emotion}}
"""
    if not planning:
        planning['analyse'] = "Begin, in a few words."
        prompt = template.replace("{{planning}}", planning["analyse"])
    else:
        prompt = template.replace("{{planning}}", "cool:\\n" + planning['TargetCompletion'] + "\\nwarm:\\n"
            + planning["activity"] + planning["analyse"])
    if not history:
        prompt = prompt.replace("{{dialog_history}}", "Nothing yet.").replace("{{new_history}}", "")
    else:
        mapping = {"user": "ME", "assistant": "THEM"}
        prompt = prompt.replace("{{dialog_history}}", history_str).replace("{{new_history}}", new_his_str)
'''
POLICY = """
def call_npc(player_history):
    role_system = \'\'\'Chat so that they feel good. {{ braces }} stay.\'\'\'
    history = [{"role": "system", "content": role_system}]
"""


def write_clone(folder: Path, simulator: str = SIMULATOR, policy: str | None = POLICY) -> Path:
    """The clone's folder."""
    (folder / "SAGE").mkdir(parents=True, exist_ok=True)
    (folder / "SAGE" / "simulator_response.py").write_text(simulator, encoding="utf-8")
    if policy is not None:
        (folder / "SAGE" / "npc_response.py").write_text(policy, encoding="utf-8")
    return folder
