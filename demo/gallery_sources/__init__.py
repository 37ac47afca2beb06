"""Where the embedded gallery's pictures, clips and captions come from; one module a source.

Every module has `items(unpacked, left_out)`, which yields `Item`s in a fixed order from the folder of unpacked packages
and counts in `left_out` what it did not take and why.
"""
