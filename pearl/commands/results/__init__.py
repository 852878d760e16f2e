"""The commands that show what runs have left: tables, pages, timelines, a judge's marks.

Knows and refuses to know what `pearl.commands` does.
"""
