"""Files as every other package writes and reads them: complete or not at all, byte-reproducible, checked.

Atomic files and folders, JSON, tables, named tensors (safetensors), published weights, digests and downloads.
Nothing here knows what the files mean.
"""
