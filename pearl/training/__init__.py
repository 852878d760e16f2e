"""How a drafter is made: prompts, recorded answers of the target, the objective, training, distillation, diagnosis.

Knows: data sets of recorded texts, optimizers. Refuses to know: decoding in two processes.
"""
