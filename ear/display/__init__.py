"""What people see while a program runs: progress with rates, live rows and curves of trainings, trackers.

Nothing here can change a result, so no stage of the pipeline depends on this package.
"""
