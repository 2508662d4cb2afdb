"""Model to what people and scripts read: words, columns, colour and JSON keys live only here.

Text renderers return rich renderables; whoever prints them decides about colour and width.
"""
