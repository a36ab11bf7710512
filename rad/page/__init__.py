"""The parts of the page that `app.py` puts together: a module for each tab, none of them with an algorithm in it."""
