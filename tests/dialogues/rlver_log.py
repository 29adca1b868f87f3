"""Dialogues as RLVER's published simulator (hard_player_simulator_dsv3.py) logs them: no `task`, changes as text."""


def felt(change):
    """As RLVER's simulator writes an appraisal: SAGE's TargetCompletion is called reason, the change is text."""
    return {"content": "a hug", "reason": "partly", "activity": "hm", "analyse": "better", "change": change}


def logged(*turns, ending="\n####隐藏主题:\n***你希望对方用心倾听你的情绪宣泄"):
    """A dialogue as RLVER's simulator logs one; `turns` are (change as text, emotion, reply)."""
    history = [
        {
            "role": "user",
            "content": "唉。",
            "thinking": "短",
            "emotion-point": 30,
            "planning": {"analyse": "请你开启倾诉"},
        }
    ]
    for change, emotion, reply in turns:
        history += [
            {"role": "assistant", "content": "怎么了？"},
            {"role": "user", "content": reply, "thinking": "1", "emotion-point": emotion, "planning": felt(change)},
        ]
    return {
        "id": "p1",
        "emo_point": history[-1]["emotion-point"],
        "emo_state": "Emotion-C",
        "target": "eq",
        "player": "a student",
        "scene": f"an exam{ending}",
        "character": "calm",
        "topic": "school",
        "history": history,
    }
