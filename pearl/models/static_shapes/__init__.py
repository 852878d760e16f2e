"""Forwards of static shapes, so that a GPU can replay them as recorded graphs: of one text, of several, of a drafter's
network.

A decoding step launches hundreds of small kernels; on a GPU the launching takes longer than the kernels. A CUDA graph
launches them all at once, but it replays *addresses*: same shapes, same buffers. So row counts and the slots read come
in buckets, and all that differs between two passes of one shape (token ids, positions, slots, what a row sees) is a few
hundred numbers in one buffer (`inputs`), which one copy fills. What a mask can be computed from is sent, not the mask.

A `Capture` says what becomes of a shape's code: it is recorded and replayed (`pearl.models.cuda_graphs`), or called
anew each time, which is the reference. The code is the same, so one may be compared with the other bit for bit
(`pearl.models.numerics_check`), and without a GPU all but the recording is tested.
"""
