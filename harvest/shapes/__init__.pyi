from . import draw as draw
from . import quality as quality
from .check import read_picture as read_picture
