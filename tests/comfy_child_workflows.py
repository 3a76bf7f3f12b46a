"""Run API graphs one after the other in one ComfyUI, as a user would.

Give back how each ended and the pictures asked for.
"""

import comfy_side

ended, pictures = [], {}
for job in comfy_side.given():
    want = {name: (node, slot) for name, (node, slot) in job["want"].items()}
    ran = comfy_side.run_prompt(job["graph"], want=want, fresh=False)
    print(job["name"], "ran" if ran.ok else f"failed: {ran.error} {ran.problems}", flush=True)
    ended.append(
        {"name": job["name"], "error": ran.error, "node": ran.error_node, "problems": str(ran.problems or "")}
    )
    pictures |= ran.values
comfy_side.answer(ended, {name: value for name, value in pictures.items() if value is not None})
