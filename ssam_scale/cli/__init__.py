"""The commands of `ssam-scale`: each reads its arguments, calls one function of the package, and prints."""
