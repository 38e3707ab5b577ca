"""A stand-in for text-generation-webui's `modules`, written from what was observed of it; none of its code."""
