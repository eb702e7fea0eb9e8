"""Images, from the raw files to rows in HDF5.

`sources` lists raw images, `manifest` records the list, `preparation` decodes and crops them, `prepared` reads the
result.
"""
