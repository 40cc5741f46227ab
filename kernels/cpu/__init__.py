"""The CPU's own kernels, in C++: a whole step of a decoder is one call.

They are built with the package where there is a compiler. Without them the reference backend
does the work, several times slower.
"""
