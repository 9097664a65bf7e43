"""The calibration's sizes, made small in a process of its own: code to run there first."""

# Some questions that a prompt of so few tokens has room for.
SMALL_SIZES = """
from orthorank_vllm.calibrate import calibration as sizes
sizes.PROMPT, sizes.ANSWER, sizes.HELD_BACK_ANSWER, sizes.QUESTIONS = 144, 24, 16, 3
from orthorank_vllm.calibrate import fit_texts
fit_texts.LENGTH, fit_texts.ANSWER = 168, 24
fit_texts.COUNTS = dict.fromkeys(fit_texts.COUNTS, 1)
sizes.SAMPLES = sizes.HELD_BACK_SAMPLES = sizes.SCOUTS = dict.fromkeys(sizes.SAMPLES, 1)
"""
