"""The HTTP edge for machines, the command line, and the wiring of all packages.

Owns routes, status codes and processes; decides no rule about keys, limits or models. Imports every floor below.
"""
