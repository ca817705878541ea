"""The names of the ten classes, in the order of their labels. Apart, so that listing them costs no torch."""

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
PLAIN_PROMPTS = tuple(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in CLASSES)
"""The prompt of each class without attributes: "a t-shirt" to "an ankle boot"."""
