"""Loading models, generating videos, planning runs, and video files."""

from xattn_video.top_level import become

if __name__ == "pipelines":
    become(__name__)
