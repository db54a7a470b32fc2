"""The doors by which input comes into the program, each a module with

SHARE   number of trials that take a few seconds, in every run of the tests
trials  (folder, count, seed) -> Iterator[tests.fuzz.Trial]: changed input, each made when it is asked for
"""
