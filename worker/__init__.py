"""Runs jobs: the Celery app, the supervising threads with their compute children, limits, recovery.

A Celery worker here is light: it never imports a numerical library. Each of its threads is a slot; a slot owns one
compute child (`worker.child`), a spawned process joined by pipes, and is the one who claims, watches, kills and keeps.
"""
