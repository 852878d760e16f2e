"""From a name to a loaded model: hub ids, folders and GGUF files, checked before anything is loaded.

Knows: formats, tokenizers, memory, devices, what was measured here before. Refuses to know: decoding.
"""
