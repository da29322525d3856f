"""The jobs in Django's admin, to read only. To act on jobs, use `fetch-worker` or its own page."""

from typing import Any

from django.contrib import admin

from worker.django.models import Job, Output


class ReadOnly:
    """Nothing can be added, changed or deleted."""

    def has_add_permission(self, *_: Any) -> bool:
        """Return False."""
        return False

    def has_change_permission(self, *_: Any) -> bool:
        """Return False: Django then shows the fields as text."""
        return False

    def has_delete_permission(self, *_: Any) -> bool:
        """Return False."""
        return False


class Outputs(ReadOnly, admin.TabularInline):  # type: ignore[misc]  # Django has no annotations
    """The outputs on the page of a job."""

    model = Output
    fields = ("position", "status", "media_type", "size_bytes", "location", "attempts", "error_code", "error_message")
    ordering = ("position",)
    extra = 0


@admin.register(Job)
class Jobs(ReadOnly, admin.ModelAdmin):  # type: ignore[misc]  # Django has no annotations
    """The list of jobs, newest first, and the page of one job."""

    list_display = ("id", "remote_id", "account", "kind", "status", "reference", "polls", "submitted_at", "error_code")
    list_filter = ("status",)
    search_fields = ("=remote_id", "=reference")
    search_help_text = "A remote id or a reference, whole."
    ordering = ("-id",)
    inlines = (Outputs,)
    show_full_result_count = False  # counting a million jobs takes the database a second
