"""The sender and the receiver of the mails in demo.sh.

    demo.py sink DIRECTORY             receive mails, each into a file of its own;
                                       write the port to DIRECTORY/port
    demo.py write KIND FILE            write a mail: clean, eicar, or zipped
    demo.py send HOST:PORT FILE        send it, print the last reply of the server
"""

import os
import smtplib
import socket
import socketserver
import sys

import real

FROM, TO = "sender@example.com", "receiver@example.com"
TEXT = ("From: The Sender <%s>\r\nTo: The Receiver <%s>\r\nSubject: %s\r\n")


class Sink(socketserver.StreamRequestHandler):
    """A minimal mail server."""

    def say(self, text):
        self.wfile.write(text.encode() + b"\r\n")

    def handle(self):
        self.say("220 next.hop.example ESMTP")
        for line in self.rfile:
            verb = line[:4].upper()
            if verb == b"EHLO":
                self.say("250-next.hop.example\r\n250-SIZE 104857600\r\n"
                         "250 8BITMIME")
            elif verb == b"DATA":
                self.say("354 go ahead")
                self.say("250 2.0.0 the next hop has stored it as mail %d"
                         % self.store())
            elif verb == b"QUIT":
                self.say("221 2.0.0 bye")
                return
            else:
                self.say("250 2.0.0 ok")

    def store(self):
        mail = b""
        for line in self.rfile:
            if line == b".\r\n":
                break
            mail += line[1:] if line.startswith(b".") else line
        else:
            raise ConnectionError("the client went away within a mail")
        number = 1
        while os.path.exists(str(number)):
            number += 1
        with open("%d.new" % number, "wb") as file:
            file.write(mail)
        os.rename("%d.new" % number, str(number))
        return number


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


def sink(directory):
    os.chdir(directory)
    with Server(("127.0.0.1", 0), Sink) as server:
        with open("port.new", "w") as file:
            file.write("%d\n" % server.server_address[1])
        os.rename("port.new", "port")
        server.serve_forever()


def write(kind, path):
    if kind == "clean":
        mail = (TEXT % (FROM, TO, "lunch") +
                "\r\nShall we meet at noon?\r\n").encode()
    else:
        name = "eicar.com" if kind == "eicar" else "eicar.zip"
        data = real.EICAR if kind == "eicar" else real.zipped(real.EICAR)
        mail = real.attached(
            data, name, (TEXT % (FROM, TO, "look at " + name)).encode())
    with open(path, "wb") as file:
        file.write(mail)


def send(address, path):
    host, _, port = address.rpartition(":")
    with open(path, "rb") as file:
        mail = file.read()
    client = smtplib.SMTP(timeout=60)
    code, text = client.connect(host, int(port))
    if code == 220:
        client.ehlo("sender.example")
        client.mail(FROM)
        client.rcpt(TO)
        code, text = client.data(mail)
    print(code, text.decode(errors="replace"))
    try:
        client.quit()
    except (smtplib.SMTPException, socket.error):
        pass


if __name__ == "__main__":
    try:
        {"sink": sink, "write": write, "send": send}[sys.argv[1]](*sys.argv[2:])
    except (KeyError, IndexError, TypeError):
        sys.exit(__doc__)
    except KeyboardInterrupt:
        pass
