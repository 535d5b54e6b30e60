"""Dictionary -> pictures: edit features while a picture is made, and measure what happens.

Importing this package loads neither torch nor diffusers; `steer.coder`, `steer.hooks` and
`steer.generate` do.
"""
