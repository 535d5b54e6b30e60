"""`jaxdict interp report`: an index as pages to browse.

Templates are jinja2's, in `templates/`; pictures are drawn with Pillow.
"""
