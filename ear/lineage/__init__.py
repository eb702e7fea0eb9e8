"""What outputs were made from: parameters, code and inputs, noted when a stage starts and checked before it publishes.

Also the folder of a stage's unfinished work, which survives a kill, an edit and a failed commit.
"""
