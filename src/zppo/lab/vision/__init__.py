"""The lab's world of pictures: what is drawn, what is asked about it, and a student and a teacher that see."""
