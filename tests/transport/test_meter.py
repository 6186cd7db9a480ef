from transport.meter import Count, Meter, SocketCount, read_socket_count, zmtp_bytes


def test_the_measured_overhead_of_a_frame():
    assert zmtp_bytes(1) == 36  # DESIGN: one frame, CURVE, 1-byte payload
    assert zmtp_bytes(222) == 257
    assert zmtp_bytes(223) == 265  # past 255 bytes of body the length takes 8 bytes
    assert zmtp_bytes(1, curve=False) == 3


def test_a_meter_counts_by_direction_and_type():
    meter = Meter()
    meter.count_up("Report", 70)
    meter.count_up("Report", 70)
    meter.count_up("Leave", 2)
    meter.count_down("Commit", 300)
    assert meter.up["Report"] == Count(2, 140, 210)
    assert meter.total_up == Count(3, 142, 247)
    assert meter.total_down == Count(1, 300, 342)


def test_the_wire_estimate_charges_every_segment_its_headers():
    count = SocketCount(bytes_sent=100, bytes_received=36, segments_sent=2, segments_received=1)
    assert (count.wire_bytes_sent, count.wire_bytes_received) == (232, 102)
    assert count + count == SocketCount(200, 72, 4, 2)


def test_what_is_no_tcp_socket_has_no_count(tmp_path):
    with open(tmp_path / "file", "w") as file:
        assert read_socket_count(file.fileno()) is None
