"""The grader: what answer a text gives, and whether it is the right one. Near-misses decide whether a score can be
trusted, so most of this is tables."""
import json
import random
import re
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

import eval as ev

# One pair is "a <=> b", pairs are parted by ";;". Every pair is tried in both directions.
EQUAL = r"""
0.5 <=> \frac{1}{2} ;; 50\% <=> \frac12 ;; 3 1/2 <=> 7/2 ;; 1.5 \times 10^3 <=> 1500 ;; 1.5\cdot10^{-3} <=> 0.0015
1.5e3 <=> 1500 ;; 6.02e+23 <=> 6.02 \times 10^{23} ;; 10\,000 <=> 10000 ;; 10 000 <=> 10000
1{,}000{,}000 <=> 1000000 ;; \$1,234.50 <=> 1234.5 ;; €5 <=> 5 ;; 3 million <=> 3000000 ;; 0.333333 <=> 1/3
0.\overline{3} <=> \frac13 ;; 0.1\overline{6} <=> 1/6 ;; 12 square units <=> 12 ;; 12\text{ units}^2 <=> 12
12 \text{ cm}^2 <=> 12 cm^2 ;; 5 m/s <=> 5 \text{ m/s} ;; 60 mph <=> 60 ;; x = 5 <=> 5 ;; 5 = x <=> 5 ;; x=2+3=5 <=> 5
AB = 3\sqrt{2} \approx 4.24 <=> 3\sqrt2 ;; \angle ABC = 45^\circ <=> 45 ;; x=1 or x=2 <=> \{1,2\}
x = 1, 2 <=> x=2, x=1 ;; x=\pm 2 <=> x=2 or x=-2 ;; x=1, y=2 <=> (1,2) ;; (x,y)=(1,2) <=> x=1, y=2
y=2,x=1 <=> (x,y) = (1,2) ;; x>3 <=> (3,\infty) ;; x \ge 3 <=> [3, \infty)
x<2 \text{ or } x>3 <=> (-\infty,2)\cup(3,\infty) ;; 3 < x <=> x>3 ;; x \neq 3 <=> (-\infty,3)\cup(3,\infty)
\mathbb{R}\setminus\{3\} <=> (-\infty,3)\cup(3,\infty) ;; (-\infty,\infty) <=> \mathbb{R}
\{x | x > 3\} <=> (3,\infty) ;; (3,4)\cup(1,2) <=> (1,2)\cup(3,4) ;; \begin{pmatrix}1\\2\end{pmatrix} <=> (1,2)
[[1,2],[3,4]] <=> \begin{pmatrix}1&2\\3&4\end{pmatrix} ;; [1,2;3,4] <=> \begin{bmatrix}1&2\\3&4\end{bmatrix}
\frac12\begin{pmatrix}2\\4\end{pmatrix} <=> \begin{pmatrix}1\\2\end{pmatrix} ;; y = 2x+1 <=> 2x - y + 1 = 0
y=2x+1 <=> 2x+1 ;; f(x) = x^2 <=> x^2 ;; f^{-1}(x) = x-1 <=> x-1 ;; (x+1)^2 <=> x^2+2x+1 ;; x(x+1) <=> x^2+x
\sin^2 x + \cos^2 x <=> 1 ;; \sin(2x) <=> 2\sin x\cos x ;; e^{i\pi} <=> -1 ;; \sqrt{8} <=> 2\sqrt2
\sqrt[3]{8} <=> 2 ;; \sqrt[3]{-8} <=> -2 ;; 8^{1/3} <=> 2 ;; \ln(x^2) <=> 2\ln x ;; \log_2 8 <=> 3
\log_{10} 100 <=> 2 ;; \binom{5}{2} <=> 10 ;; 5! <=> 120 ;; |{-3}| <=> 3 ;; \lfloor 2.5 \rfloor <=> 2
\cos 60^\circ <=> 1/2 ;; \sin 30^\circ <=> 0.5 ;; 2\cos 15^{\circ} <=> \frac{\sqrt6+\sqrt2}{2} ;; \tan(45^\circ) <=> 1
\frac{\sqrt{2}}{2} <=> \frac{1}{\sqrt2} ;; (\text{B}) <=> B ;; \textbf{(B)}\ 12 <=> B ;; \textbf{(B) } 12 <=> 12
B. 12 <=> B ;; (B) <=> B ;; B <=> (B) ;; Option B <=> B ;; \text{B} <=> B ;; \mathbf{B} <=> B ;; Yes <=> yes.
No. <=> no ;; \text{Even} <=> even ;; an ellipse <=> ellipse ;; \text{June 20} <=> June 20
4:30 p.m. <=> \text{4:30 p.m.} ;; 10:30 a.m <=> 10:30 \text{ a.m.}
4:30 PM <=> 4:30 pm ;; 1:2 <=> \frac{1}{2} ;; 2:4 <=> 1:2 ;; 2516_8 <=> 2516_{8}
i\sqrt{3} <=> \sqrt{3}i ;; 2\text{i} <=> 2i ;; 3+4i <=> 4i+3 ;; ½ <=> 0.5 ;; 3½ <=> 3.5 ;; x² <=> x^2
√3 <=> \sqrt{3} ;; 2√3/3 <=> \frac{2\sqrt3}{3} ;; −5 <=> -5 ;; 5×10³ <=> 5000 ;; 5\text{ apples} <=> 5
15 apples <=> 15 ;; \emptyset <=> \varnothing ;; \{\} <=> \emptyset ;; {1,2,3} <=> \{3,2,1\} ;; 1,2,3 <=> 3, 2, 1
[1,2,3] <=> (1,2,3) ;; \frac{x}{y} <=> x/y ;; \frac{x^2-1}{x-1} <=> x+1 ;; -\frac{1}{x} <=> \frac{-1}{x}
2^{x+1} <=> 2\cdot 2^x ;; a^{-1} <=> \frac{1}{a} ;; x^{\frac12} <=> \sqrt{x}
\text{The answer is } 5 <=> \text{The answer is } 5 ;; 1,2,\ldots,10 <=> 1, 2, \ldots, 10
\pm\sqrt{5} <=> \sqrt5,-\sqrt5 ;; 12\% <=> 0.12 ;; 33\frac{1}{3}\% <=> 33\frac13\% ;; 33\frac{1}{3} <=> \frac{100}{3}
100^\circ \text{C} <=> 100 ;; \approx 5 <=> 5 ;; \boxed{5} <=> 5 ;; $5$ <=> 5 ;; \(5\) <=> 5 ;; \[ 5 \] <=> 5
\displaystyle\frac{1}{2} <=> 0.5 ;; {5} <=> 5 ;; (5) <=> 5 ;; 5. <=> 5 ;; +5 <=> 5 ;; -(-5) <=> 5 ;; --5 <=> 5
007 <=> 7 ;; .50 <=> 1/2 ;; 1/2x <=> \frac{x}{2} ;; \frac{1}{2}x <=> x/2 ;; P(A) = 0.5 <=> 0.5
\text{Area} = 25\pi <=> 25\pi ;; 25pi <=> 25\pi ;; sqrt(3)/2 <=> \frac{\sqrt3}{2} ;; 2*sqrt(3) <=> 2\sqrt{3}
x**2 <=> x^2 ;; pi/4 <=> \frac{\pi}{4} ;; 3,4 <=> (3,4) ;; 3 \text{ and } 4 <=> 3, 4 ;; n^2+n <=> n(n+1)
\frac{n(n+1)}{2} <=> \frac{n^2+n}{2} ;; \overline{AB} <=> AB ;; 10^{-2} <=> 0.01 ;; 1/100 <=> 1\%
2\frac{1}{2} <=> 5/2 ;; -2\frac{1}{2} <=> -2.5 ;; 7\frac{1}{2}\text{ hours} <=> 7.5 ;; 90^{\circ} <=> 90 degrees
\frac{\pi}{2}\text{ radians} <=> \frac\pi2 ;; x^2 + y^2 = 4 <=> x^2+y^2-4=0 ;; y - 3 = 2(x - 1) <=> y = 2x+1
4x - 5y = -50 <=> 5y - 4x = 50 ;; 1 < x \leq 3 <=> (1,3] ;; 3 > x > 1 <=> 1<x<3
\left(\frac{1}{2}, \infty\right) <=> (0.5, +\infty) ;; [0, \infty[ <=> [0, \infty[ ;; x\in\{1,2\} <=> 1,2
x \in (1,3) <=> 1<x<3 ;; \cot x <=> \frac{\cos x}{\sin x} ;; e <=> \mathrm{e} ;; 2e <=> 2 \mathrm{e}
e^{-x} <=> \frac{1}{e^x} ;; y = e^{-x} <=> e^{-x} ;; 0.30000000000000004 <=> 0.3
3.0 \times 10^8 m/s <=> 3\times10^8 ;; \frac{\frac12}{3} <=> 1/6 ;; 1\,234 <=> 1234 ;; \text{(A), (C)} <=> A, C
A and C <=> C, A ;; \text{no solution} <=> no solution ;; No solution <=> \text{no solution} ;; \max(2,3) <=> 3
1000000 <=> 10^6 ;; 2^{100} <=> 1267650600228229401496703205376 ;; 2 \sqrt{3}\text{ cm} <=> 2\sqrt 3
(2,3) \text{ and } (4,5) <=> (4,5),(2,3) ;; \{(1,2),(3,4)\} <=> (1,2), (3,4)
x = \frac{-1 \pm \sqrt{5}}{2} <=> \frac{-1+\sqrt5}{2}, \frac{-1-\sqrt5}{2} ;; \sqrt{x^2+1} <=> (x^2+1)^{1/2}
\log x <=> \ln x ;; C(10,3) <=> C(10,3) ;; \dfrac{3}{4} <=> .75 ;; $\frac{3}{4}$ <=> 75\% ;; twelve <=> twelve
\frac{5}{12}\text{ of the pie} <=> 5/12 ;; -\infty <=> -\infty ;; \infty <=> +\infty ;; 3x+2y <=> 2y + 3x
(x-1)(x-2)=0 <=> x^2-3x+2=0 ;; 1 : 3 <=> 1:3 ;; 2, 3, and 5 <=> 2,3,5 ;; \frac{1}{2} , \frac{1}{3} <=> 1/3, 1/2
100! <=> 100! ;; \frac{\sqrt{30}}{12} $. <=> \frac{\sqrt{30}}{12}
2 \ln x+3 \ln \left(y^{2}-z\right)-\frac{1}{2} \ln (y+1) <=> \ln\frac{x^2(y^2-z)^3}{\sqrt{y+1}} ;; 5th <=> 5
two <=> 2 ;; 18 (dollars) <=> 18 ;; 3/4 or 0.75 <=> 0.75 ;; \langle 1,2\rangle <=> (1,2) ;; x=1 \lor x=2 <=> 1,2
\gcd(12,18) <=> 6 ;; (b) <=> B ;; \mathrm{lcm}(4,6) <=> 12 ;; 2\mathbf{i}+3\mathbf{j} <=> 3\mathbf{j}+2\mathbf{i}
-\infty<x<3 <=> (-\infty,3) ;; x \in \mathbb{R} <=> (-\infty,\infty) ;; x=2,y=3 <=> 2,3 ;; 5\text{ (units)} <=> 5
12/5 or 2.4 <=> 2.4 ;; \frac{a}{b} <=> a/b ;; \dfrac{-3}{4} <=> -\frac34 ;; \frac{3}{-4} <=> -3/4
-\frac{3}{4} <=> \frac{-3}{4} ;; 0.5x <=> \frac{x}{2} ;; x^{10} <=> x^10 ;; 3.0 <=> 3 ;; 1.0e-5 <=> 10^{-5}
1e-5 <=> 0.00001 ;; 1,000,000 <=> 10^6 ;; $1,000 <=> 1000 ;; 1 000 000 <=> 1000000 ;; (2,3) <=> 2,3 ;; {2,3} <=> 2,3
x^2 + 3x <=> x(x+3) ;; ab <=> ba ;; sin(x) <=> \sin x ;; cos x <=> \cos(x) ;; tan(pi/4) <=> 1 ;; exp(1) <=> e
sqrt(2) <=> 2^{0.5} ;; sqrt2 <=> \sqrt{2} ;; |x-2| <=> \left|x-2\right| ;; |x-2| <=> |2-x| ;; \lvert -3 \rvert <=> 3
n! <=> n! ;; (n+1)! <=> (n+1) n! ;; \frac{n!}{k!(n-k)!} <=> \binom{n}{k} ;; 2^n <=> 2^{n} ;; 2^{n+1}-2 <=> 2(2^n-1)
x\sqrt{x} <=> x^{3/2} ;; \sqrt{x}\sqrt{y} <=> \sqrt{xy} ;; \log_b a <=> \frac{\ln a}{\ln b} ;; \ln 8 <=> 3\ln 2
36x\sqrt{35x} <=> 36\sqrt{35}x^{1.5} ;; a>b <=> b<a ;; x<1 or x>2 <=> x>2 or x<1 ;; x^2 \le 4 <=> 4 \ge x^2
y=\frac{1}{x} <=> y = x^{-1} ;; x=3 <=> 3=x ;; x=3,5 <=> x=3 or x=5 ;; x=3,5 <=> \{3,5\} ;; x\in\{3,5\} <=> x=3,5
\{(1,2)\} <=> (1,2) ;; x = \{1,2\} <=> 1,2 ;; n=7 <=> 7 ;; 10\% <=> 0.1 ;; 10\% <=> 1/10 ;; 10% <=> 10
10% <=> 10.0% ;; 10 percent <=> 10\% ;; 90^\circ <=> 90° ;; 90 degrees <=> 90^\circ ;; \$5.00 <=> 5
5 dollars <=> \$5 ;; 5 USD <=> 5 ;; €10 <=> 10 ;; 12 in. <=> 12 inches ;; \text{Saturday} <=> saturday
True <=> true ;; \text{True} <=> True ;; infinitely many <=> infinitely many ;; undefined <=> \text{undefined}
\text{A} <=> (A) ;; A. <=> A ;; \alpha <=> α ;; \theta=\pi/6 <=> \frac{\pi}{6} ;; 2^{3} <=> 8 ;; \sqrt{16} <=> 4
\sqrt[3]{27} <=> 3 ;; \frac{0}{5} <=> 0 ;; -0 <=> 0 ;; 0.0 <=> 0 ;; 1.50 <=> 1.5 ;; 1/3 <=> 0.33333333
2/3 <=> 0.66666667 ;; 2/3 <=> 0.6666666 ;; \pi <=> 3.14159265 ;; \sqrt2 <=> 1.41421356 ;; x^2+y^2-4=0 <=> x^2+y^2=4
2x^2+2y^2=8 <=> x^2+y^2=4 ;; \frac{x^2}{4}+\frac{y^2}{9}=1 <=> 9x^2+4y^2=36 ;; y=2x+3 <=> 2x-y=-3 ;; y-3=2x <=> y=2x+3
x=y <=> y=x ;; 1+2i <=> 2i+1 ;; (1+i)^2 <=> 2i ;; \frac{1}{i} <=> -i ;; e^{\pi i/2} <=> i
\cos\frac{\pi}{3}+i\sin\frac{\pi}{3} <=> e^{i\pi/3} ;; |3+4i| <=> 5
\begin{bmatrix}1\\2\end{bmatrix} <=> \begin{pmatrix}1\\2\end{pmatrix}
\left(\begin{array}{cc}1&2\\3&4\end{array}\right) <=> \begin{pmatrix}1&2\\3&4\end{pmatrix} ;; a_1 <=> a_{1}
a_{n+1} <=> a_{n+1} ;; x_1=2, x_2=3 <=> x_{1} = 2, x_{2} = 3 ;; x_1=2,x_2=3 <=> 2,3
\frac{1}{2}\sqrt{3} <=> \frac{\sqrt3}{2} ;; \frac{\sqrt{3}}{3} <=> \frac{1}{\sqrt3}
\sqrt{\frac{1}{2}} <=> \frac{\sqrt2}{2} ;; \sqrt{3+2\sqrt2} <=> 1+\sqrt2 ;; 3\sqrt{2}+\sqrt{2} <=> 4\sqrt2
\frac{a+b}{2} <=> \frac{b+a}{2} ;; (x-1)(x+1) <=> x^2-1 ;; -(x-1) <=> 1-x ;; a^2-b^2 <=> (a-b)(a+b)
[1,2) <=> 1 \le x < 2 ;; (1,2] <=> 1<x\le2 ;; (1,2) <=> 1<x<2 ;; x\ge1 \text{ and } x\le 2 <=> [1,2]
(-\infty,1)\cup(2,\infty) <=> x<1 \text{ or } x>2 ;; 1\frac{1}{2}\% <=> 1.5\% ;; 3:4 <=> 3/4 ;; 3:4 <=> 6:8
1:2:3 <=> 2:4:6 ;; \text{2 pm} <=> 2 p.m. ;; 1{,}234 <=> 1,234 ;; 1.2\times10^4 <=> 12000 ;; 1.2 x 10^4 <=> 12000
1.2*10^4 <=> 12,000 ;; 2\cdot3 <=> 6 ;; 5\,\text{m} <=> 5 ;; 5\mathrm{\,cm} <=> 5 ;; 5~\mathrm{cm}^2 <=> 5
9.8\,\mathrm{m/s^2} <=> 9.8 ;; 25 \, \text{km/h} <=> 25 ;; 72°F <=> 72 ;; 72^\circ \text{F} <=> 72
20^\circ C <=> 20^\circ\mathrm{C} ;; \text{five} <=> 5 ;; \begin{cases}x=1\\y=2\end{cases} <=> x=1, y=2
5 \mathrm{~cm} <=> 5 ;; 5 \mathrm{~m} <=> 5 \text{ m} ;; 10 \mathrm{~km} / \mathrm{h} <=> 10
8 \mathrm{~cm}^{2} <=> 8 ;; \left\{x \mid -1<x<2\right\} <=> (-1,2) ;; \left\{1,2\right\} <=> \{2,1\}
y^{2}=4 x <=> y^2-4x=0 ;; a \in(1,2) <=> 1<a<2 ;; m \leqslant 2 <=> (-\infty,2] ;; -\frac{1}{2} or 3 <=> 3, -1/2
\frac{\pi}{3}+2k\pi <=> 2k\pi+\frac{\pi}{3} ;; （1，2） <=> (1,2) ;; 1、2 <=> 2,1 ;; \frac{1}{2}:\frac{1}{3} <=> 3:2
180^{\circ}-\alpha <=> 180-\alpha ;; \dfrac{x}{2} <=> \frac12x ;; 2\sqrt{3}\,\mathrm{cm} <=> 2\sqrt3
6\pi\text{ cm}^3 <=> 6\pi ;; 1.5 hours <=> 1.5 ;; $12 <=> 12.00 ;; 12 dollars <=> 12.00 ;; x=-3,x=2 <=> x=2,x=-3
x_1=-3, x_2=2 <=> -3,2 ;; x=-3 \quad\text{or}\quad x=2 <=> \{-3,2\} ;; A,B <=> B,A ;; \text{A and C} <=> A, C
Option (A) <=> A ;; D. 12 cm <=> D ;; D. 12 cm <=> 12 ;; I <=> I ;; I and II <=> I, II ;; (i) <=> i
0.5 cm <=> 1/2 cm ;; -1/3 <=> -0.333333 ;; f^\prime <=> f' ;; 2^{-1} <=> 0.5 ;; 10^{-3} <=> 0.001
\frac{1}{10^3} <=> 10^{-3} ;; \frac{2}{3}x <=> \frac{2x}{3} ;; 3(x+1) <=> 3x+3 ;; x(y+z) <=> xy+xz
\frac{1}{a}+\frac{1}{b} <=> \frac{a+b}{ab} ;; a^{m+n} <=> a^m a^n ;; \ln(ab) <=> \ln a+\ln b ;; e^{\ln x} <=> x
\max(a,b) <=> \max(b,a) ;; \sum_{i=1}^n i <=> \sum_{i=1}^n i ;; \int x dx <=> \int x dx ;; \lim <=> \lim
"""
DIFFERENT = r"""
0.33 <=> 1/3 ;; 0.3333 <=> 1/3 ;; 3.14 <=> \pi ;; 22/7 <=> \pi ;; 1 <=> 10 ;; 12 <=> 1 ;; A <=> B ;; A <=> a
A or B <=> A ;; Apple <=> A ;; AB <=> A ;; (A) 5 <=> (B) 5 ;; 50\% <=> 5000 ;; 5 cm <=> 5 m ;; 5 minutes <=> 5 hours
9 a.m. <=> 9 p.m. ;; 1:03 PM <=> 1:03 AM ;; x=5 <=> y=5 ;; x = 5 <=> -5 ;; 2x=10 <=> 10 ;; x^2=4 <=> 4 ;; xy = 6 <=> 6
a+b=5 <=> 5 ;; 5 < x <=> x<5 ;; x \ge 3 <=> x>3 ;; (3,4] <=> (3,4) ;; [3,4] <=> (3,4) ;; (1,2)\cup(3,4) <=> (1,2)
(1,2) <=> \{1,2\} ;; (2,1) <=> 1,2 ;; 1,2 <=> 1,2,3 ;; 1,1,2 <=> 1,2,2 ;; \{1,2\} <=> \{1,2,3\} ;; x+1 <=> x-1
x <=> -x ;; \sqrt{x^2} <=> x ;; |x| <=> x ;; \sin x <=> \cos x ;; \sin^{-1} x <=> \csc x ;; x^2 <=> 2x ;; 2^x <=> x^2
a/b <=> b/a ;; a-b <=> b-a ;; i <=> -i ;; 1+i <=> 1-i ;; \pm 5 <=> 5 ;; 5 <=> \pm 5 ;; listen <=> silent
Monday <=> Tuesday ;; odd <=> even ;; none <=> 0 ;; no <=> 0 ;; not 5 <=> 5 ;; at most 5 <=> 5 ;; 2516_8 <=> 2516_7
11/2 <=> 1 1/2 ;; 1\frac12 <=> 1/2 ;; 2\sqrt3 <=> \sqrt[2]{3} ;; \sqrt[3]{2} <=> 3\sqrt2 ;; 0 <=> \frac{1}{2004!}
\frac{1}{2004!} <=> \frac{1}{2006!} ;; 10^{100} <=> 10^{101} ;; 12345678901234567890 <=> 12345678901234567891
0.1234567 <=> 0.1234568 ;; 5.0000001 <=> 5 ;; 4.9999999 <=> 5
\begin{pmatrix}1\\2\end{pmatrix} <=> \begin{pmatrix}1&2\end{pmatrix} ;; \begin{pmatrix}1\\2\end{pmatrix} <=> (2,1)
\begin{vmatrix}1&2\\3&4\end{vmatrix} <=> \begin{pmatrix}1&2\\3&4\end{pmatrix} ;; y=x <=> y=-x ;; y=2x+1 <=> 2x+2
x^2+y^2=4 <=> x^2+y^2=2 ;; x<5 <=> x<6 ;; x+y<1 <=> x+y>1 ;; 12:00 <=> 12 ;; 12:00 <=> 6:00 ;; 1:30 <=> 2:60
3 <=> 3x ;; 3x <=> 3 ;; 2 xy <=> 2 ;; 2abcd <=> 2 ;; x <=> y ;; f(x) <=> f(y) ;; f(x+1) <=> f(x)+1
\ln x <=> \log_2 x ;; \frac{1}{2} <=> 2 ;; -1/2 <=> 1/2 ;; 1/2 <=> \frac{1}{-2} ;; 3 million <=> 3 ;; June 20 <=> 20
\text{June 20} <=> \text{June 21} ;; Infinity <=> 0 ;; \infty <=> -\infty ;; \emptyset <=> 0 ;; (5 <=> 5 )+1
1/0 <=> 1/0 + 1 ;; 0/0 <=> 1 ;; \{5\} <=> 6 ;; 7 = 11a+c <=> 11a+c ;; =5 <=> 6 ;; x\neq 3 <=> x=3 ;; x \neq 3 <=> 3
x>3 <=> 3 ;; x\in[1,2] <=> 1,2 ;; 1-2 <=> 1,2 ;; 1\text{ or }2 <=> 1 ;; 1 <=> 1 \text{ or } 2 ;; 5x <=> 5\text{ x}^2
2\pi <=> 6.28 ;; \sqrt2 <=> 1.414 ;; \frac{\sqrt{5}-1}{2} <=> 0.618 ;; e <=> 2.718 ;; 32, 349 <=> 32349
(1,234) <=> 1234 ;; 1.234 <=> 1234 ;; 1e3 <=> 13 ;; true <=> false ;; a_1 <=> a_2 ;; x' <=> x ;; B <=> 8 ;; O <=> 0
D <=> \text{E} ;; E <=> \mathrm{E}*2 ;; x^{2}+x <=> x^{2}-x ;; \sqrt{67},-\sqrt{85} <=> \sqrt{67} ;; 100% <=> 1000
-100 <=> 100 ;; 10% <=> 20% ;; 0.5% <=> 0.5 + 1 ;; 45^\circ <=> 46^\circ ;; \text{5} <=> 6 ;; {} <=> 5 ;; () <=> 5
\frac{}{} <=> 1 ;; x=y <=> y=x+1 ;; (0,0) <=> 0 ;; \{0\} <=> \emptyset ;; 2,2 <=> 2 ;; 4,\!000 <=> 4, 0
x=2,y=3 <=> 3,2 ;; 1 or 2 <=> 1 ;; 2e-1 <=> 0.2 ;; (1,000) <=> 1000 ;; [2,3] <=> 2,3 ;; log(100) <=> 2
a \ge b <=> a>b ;; (3,5) <=> (5,3) ;; n = 7 <=> m = 7 ;; 0.1 <=> 10 ;; 12 cm <=> 12 inches ;; 3 hours <=> 180 minutes
Saturday <=> Sunday ;; yes <=> no ;; A <=> A and B ;; AB <=> BA ;; x <=> X ;; 2^3 <=> 6 ;; \sqrt{16} <=> -4
1.5 <=> 1,5 ;; 2/3 <=> 0.6666665 ;; \sqrt2 <=> 1.41421357 ;; 1.41 <=> \sqrt2 ;; y=2x+3 <=> y=2x-3 ;; x+y=1 <=> x+y=2
x=5 <=> x\ge5 ;; 5 <=> x>5 ;; 2i <=> -2i ;; 3i <=> 3
\begin{pmatrix}1&2\\3&4\end{pmatrix} <=> \begin{pmatrix}1&3\\2&4\end{pmatrix} ;; \begin{vmatrix}1\end{vmatrix} <=> 1
x_1=2,x_2=3 <=> 3,2 ;; \frac{a+b}{2} <=> a+\frac{b}{2} ;; x^2-1 <=> (x-1)^2 ;; [1,2] <=> \{1,2\}
\emptyset <=> no solution ;; 3:4 <=> 4:3 ;; May 5 <=> May 6 ;; 2 \times 3 <=> 5 ;; 5\mathrm{~m} <=> 5\mathrm{~cm}
A, B, C <=> A,B ;; AC <=> A,C ;; D. 12 cm <=> C ;; f'(x) <=> f(x) ;; f''(x) <=> f^{\prime\prime}(x)
\frac{2}{3x} <=> \frac{2}{3}x ;; 3(x+1) <=> 3x+1 ;; (x+y)^2 <=> x^2+y^2 ;; \sqrt{a^2+b^2} <=> a+b
\frac{1}{a+b} <=> \frac1a+\frac1b ;; \ln(a+b) <=> \ln a+\ln b ;; \lfloor x\rfloor <=> x
\lfloor x\rfloor <=> \lceil x\rceil ;; x \mod 3 <=> x ;; P(A|B) <=> P(B|A) ;; n <=> 2n
\sum_{i=1}^n i <=> \sum_{i=1}^n i^2
"""
# (prediction, reference, verdict): the question names the base, so the prediction need not.
ONE_WAY = [("2516", "2516_8", True), ("10_2", "10", False), ("10_2", "2", False)]

COMPLETIONS = [
    ('The answer is (B).', 'B'),
    ('The correct answer is B.', 'B'),
    ('The answer is B) 12', 'B'),
    ('Answer: C', 'C'),
    ('Therefore, option (D) is correct.', 'D'),
    ('So the correct option is **B**.', 'B'),
    ('**Answer:** (A)', 'A'),
    ('The answer is **42**.', '42'),
    ('**Final Answer**\n\n42', '42'),
    ('### Final Answer\n\\(42\\)', '42'),
    ('Final Answer: \\[\n x = 5 \n\\]', 'x = 5'),
    ('B', 'B'),
    ('(C)', 'C'),
    ('...\n\nB.', 'B'),
    ('The answer is $x = 5$.', 'x = 5'),
    ('Thus $x=\\frac{3}{4}$.', '\\frac{3}{4}'),
    ('The answer is 50%.', '50%'),
    ('the answer is -3', '-3'),
    ('The answer is 1/2.', '1/2'),
    ('The answer is 3.5 meters.', '3.5'),
    ('The answer is 3 and 4.', '3 and 4'),
    ('The answer is even.', 'even'),
    ('\\boxed{\\text{(A)}}', '\\text{(A)}'),
    ('so \\boxed{x^{2}', 'x^{2}'),
    ('so \\boxed{42', '42'),
    ('so \\boxed{\\frac{1}{2}. Done', '\\frac{1}{2}'),
    ('\\fbox{9}', '9'),
    ('\\boxed{}\nThe answer is 4', '4'),
    ('\\boxed{5}<|im_end|>\n<|im_start|>user\nanother \\boxed{6}', '5'),
    ('The answer is 5</s>', '5'),
    ('The answer is 5<|eot_id|>junk 7', '5'),
    ('#### 18<|endoftext|>', '18'),
    ('#### 3/4', '3/4'),
    ('#### \\frac{3}{4}', '\\frac{3}{4}'),
    ('#### 25%', '25%'),
    ('#### 1. Setup\nwe have 4\n#### 2. Done\nso the total is 7', '7'),
    ('It costs $5.', '5'),
    ('There are 1,234 of them, i.e. 2 thousand? No: 1,234.', '1234'),
    ('He has -3 left', '-3'),
    ('5 - 3 = 2', '2'),
    ('about 3.14 or so', '3.14'),
    ('The answer is \\$12.50.', '12.50'),
    ('the answer is $\\$12.50$', '\\$12.50'),
    ('The answer is:\n\n$$\\frac{1}{2}$$', '\\frac{1}{2}'),
    ('So the answer is $$7$$.', '7'),
    ('The answer is 1,000,000.', '1000000'),
    ('The answer is 10:30 am', '10:30 am'),
    ('\\boxed{A} or \\boxed{B}', 'B'),
    ('\\boxed{\\{1,2\\}}', '\\{1,2\\}'),
    ('Hence the final answer is $\\boxed{12}$.', '12'),
    ('<think>\\boxed{3}</think> The answer is 4.', '4'),
    ('<think>so 12', '12'),
    ("I don't know.", None),
    ('The answer is unknown.', None),
    ('The answer cannot be determined', None),
    ('No solution exists.', None),
    ('answer = 7', '7'),
    ('Answer is 12 apples.', '12'),
    ('The answers are 2 and 3.', '2 and 3'),
    ('the answer is therefore 8.', '8'),
    ('The final answer is\n\n\\[ \\boxed{8} \\]', '8'),
    ('The answer is $5$ dollars', '5'),
    ('The answer is $5 dollars', '5'),
    ('Final answer: (2, 3)', '(2, 3)'),
    ('The answer is [0, 1).', '[0, 1)'),
    ('The answer is x^2 + 1.', 'x^2 + 1'),
    ('The answer is \\frac{1}{2}', '\\frac{1}{2}'),
    ('The answer is \\(\\frac{1}{2}\\).', '\\frac{1}{2}'),
    ('The answer is 42\n\nQuestion: what is 3+4? The answer is 7', '42'),
    ('$\\boxed{\\text{Yes}}$', '\\text{Yes}'),
    ('\\boxed{1,234}', '1,234'),
    ('\\boxed{ 7 }', '7'),
    ('\\boxed{$5$}', '5'),
    ('x=\\boxed{5}\\text{ cm}', '5'),
    ('The answer is two.', 'two'),
    ('result: 5', '5'),
    ('Therefore, x = 12.', '12'),
    ('so x = 2 or x = 3', '3'),
    ('= 1.5e3', '1.5e3'),
    ('The answer is: A', 'A'),
    ('The answer is A: 12', 'A'),
    ('The answer is (A) 12 apples', 'A'),
    ('Answer: A. 12 apples', 'A'),
    ('The best choice is (E)', 'E'),
    ('I choose D', 'D'),
    ('The answer is "B".', 'B'),
    ('Answer: **B. 15**', 'B'),
    ('ANSWER: 15', '15'),
    ('A: 15', '15'),
    ('the answer is about 15', '15'),
    ('The answer is approximately 3.14', '3.14'),
    ('Answer: 5 or 6', '5 or 6'),
    ('answer is \\boxed 7.', '7'),
    ('\\boxed7', '7'),
    ('\\boxed\\frac12', '\\frac12'),
    ('Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.', '\\frac{1}{2}'),
    ('The answer is 7, since 3+4 = 10-3.', '7'),
    ('答案是 5。', '5'),
    ('Ans: 5', '5'),
    ('Therefore, the answer is option C.', 'C'),
    ('The answer is \\(x=2\\) or \\(x=3\\).', 'x=2, x=3'),
    ('The answer is 5 (five).', '5'),
    ('### Answer\n\n12', '12'),
    ('Answer:\n\n- 12', '12'),
    ('Answer:\n\n* 12 cm', '12'),
    ('The answer is .5.', '.5'),
    ('The area is $12\\pi$.', '12\\pi'),
    ('We get $y = \\sqrt{2}$.', '\\sqrt{2}'),
    ('so the total is \\$45.', '45'),
    ('a total of 45%', '45'),
    ('Thus the probability is $\\frac{3}{8}$.', '\\frac{3}{8}'),
    ('The answer is\n\\begin{pmatrix}1\\\\2\\end{pmatrix}', '\\begin{pmatrix}1\\\\2\\end{pmatrix}'),
    ('**The answer is: 9**', '9'),
    ('The answer is: **9 apples**.', '9'),
    ('The final answer is: $\\boxed{\\text{B}}$', '\\text{B}'),
    ('\\boxed{x = 5 \\text{ and } y = 2}', 'x = 5 \\text{ and } y = 2'),
    ('\\[\\boxed{\\begin{matrix}1&2\\end{matrix}}\\]', '\\begin{matrix}1&2\\end{matrix}'),
    ('\\boxed{\\frac{1}{2}\\text{ of } \\{1\\}}', '\\frac{1}{2}\\text{ of } \\{1\\}'),
    # "answer" in the course of a solution states nothing
    ('To answer the question, we need how many are left: 16 - 3 = 13.\nShe makes 9*2=18 dollars.', '18'),
    ('Each correct answer is worth 2 points. He has 15 correct answers, so 30 points.', '30'),
    ('The correct answers are worth 2 points each. So he has 30 points.', '30'),
    ('Tom got 5 answers wrong: 20 - 5 = 15.\nEach is worth 2 points, so he has 30 points.', '30'),
    ('She takes .75 minutes to answer a question: 12/16 = .75.\nShe has 0 minutes left.', '0'),
    ('He spent this on the short answer questions: 120 - 75 = 45 minutes\nThere are 45/3 = 15 questions', '15'),
    ('He earned 24 points/answer = 48 points.\nWith the bonus, 48 + 16 = 64 points.', '64'),
    ('The answer to part one is 5.\nAdding 4 gives 9.', '9'),
    ('Express the answer as a percentage: 20 / 240 = 8.333...%, which rounds down to 8%', '8'),
    ('Multiply the answer by 100 for a percentage: 3/4 * 100 = 75.\nSo 25 are left.', '25'),
    ('b = 144\nAnswer: B', 'B'),
    ('The final answer of $22$.', '22'),
    # numbers at the end of a clause
    ('So the total cost is $12,000, which he pays.', '12000'),
    ('The answer is $12,000, and he keeps it.', '12000'),
    ('Therefore the probability is 1/4.', '1/4'),
    ('He ran 2 1/2 miles.', '2 1/2'),
    ('The sides are 1,234,567 and 12,34', '34'),
    # all of a stated answer, and nothing but it
    ('The answer is 3 1/2 hours.', '3 1/2'),
    ('The answer is 3 million dollars.', '3 million'),
    ('#### 3 million', '3 million'),
    ('The cost is $3 million', '3 (million)'),          # not stated: where millions are asked for, 3 is right
    ('The answer is $1$, $2$, and $3$.', '1, 2, 3'),
    ('The answer is 12 apples for 3 people.', '12'),
    ('The answer is $12 for 3 tickets.', '12'),
    ('The answer is 21 years in 3 years.', '21'),
    ('The answer is 12 (which is 3*4).', '12'),
    ('The answer is 5, not 6.', '5'),
    ('The answer is 5 more than 3, so 8.', '8'),
    ('The answer is 25pi.', '25pi'),
    ('The answer is 2 sqrt(x).', '2 sqrt(x)'),
    ('The answer is 30 min.', '30'),
    ('The answer is No.', 'No'),
    ('The answer is no real solutions.', 'no real solutions'),
]


# What a person would want of whole completions, by kind: right answers, and near misses that must stay wrong.
# One case is "completion => gold", cases are parted by ";;"; ¶ stands for a new line.
GRADED = {
"numbers beside letters of scripts without spaces": (r"""
一共卖出了125本书 => 125 ;; 共卖出125本书和3支笔，合计128件 => 128 ;; 结果等于-7 => -7 ;; 温度为-7度 => -7 ;; 所以x=3时取得最大值12 => 12
それで、りんごは全部で18個あります。 => 18 ;; 合計は36円です => 36 ;; 그래서 철수는 사과를 15개 가지고 있습니다. => 15 ;; 총 15명입니다 => 15
정답은 7입니다. => 7 ;; 답은 7개 => 7 ;; 답: 42 => 42 ;; ดังนั้นเขามีเงิน250บาท => 250 ;; เขามีแอปเปิ้ล 12 ลูก => 12
คำตอบคือ 12 => 12 ;; 所以總共有１２個 => 12 ;; 答案是１２ => 12 ;; العدد هو 42 => 42 ;; الجواب هو ٤٢ => 42
إذن المجموع ٣٫٥ => 3.5 ;; इसलिए कुल ४२ सेब हैं => 42 ;; उत्तर 42 है। => 42 ;; 最终答案：42。以上共3步。 => 42
因此，总价是1,250元 => 1250 ;; 总价是3.75元 => 3.75 ;; 概率为3/8 => 3/8 ;; 概率是3/8。 => 3/8 ;; 面积是$12\pi$平方厘米 => 12\pi
面积是$24$平方厘米 => 24 ;; 答：小明一共有42个苹果。 => 42 ;; 答：3小时后到达。 => 3 ;; 答えは５です => 5 ;; 答え：１２cm => 12 ;; 正解は 8 です。 => 8
""", r"""
第3步得到12 => 3 ;; 共有42个苹果 => 4 ;; 共有42个苹果 => 2
"""),
"units and measure words of other languages": (r"""
答案是12元 => 12 ;; 答案：3.5千米 => 3.5 ;; 答案是5千克 => 5 ;; 答案是12人 => 12 ;; 答案为15岁 => 15 ;; 答案是20平方米 => 20
答案是8只。 => 8 ;; 答案：1,200元 => 1200 ;; \boxed{15人} => 15 ;; \boxed{3.5小时} => 3.5 ;; \boxed{60\text{平方米}} => 60
\boxed{12円} => 12 ;; \boxed{42개} => 42 ;; \boxed{20ลูก} => 20 ;; \boxed{42 рубля} => 42
Ответ: 42 рубля => 42 ;; 答案是2倍 => 2 ;; 答案是30分钟 => 30 ;; 答案是30天 => 30 ;; \boxed{12厘米} => 12 cm
答案是12万元 => 120000 ;; 答案是1.5亿 => 150000000 ;; 总人口为1.2亿 => 120000000 ;; 答案是3和5 => 3, 5 ;; 答案是3、5、7 => 3,5,7
答案是42% => 42% ;; 答案是50％ => 0.5 ;; 答案是12个，因为3*4=12 => 12 ;; 答案是12个（共3箱） => 12 ;; 42명입니다. 정답: 42명 => 42
\boxed{42\text{명}} => 42 ;; $42$个 => 42 ;; 答案是$42$个 => 42 ;; \boxed{共42个} => 42 ;; \boxed{约42} => 42
""", r"""
答案是5千克 => 5000 ;; \boxed{12米} => 12 cm ;; \boxed{3小时} => 180 minutes ;; \boxed{12个} => 13 ;; 答案是12万元 => 12
答案是3小时20分钟 => 3 ;; 答案是3小时20分钟 => 20 ;; 答案是3和5 => 3 ;; 答案是3或5 => 3 ;; 答案是3到5 => 3
"""),
"letters chosen in Chinese, Japanese, Korean, Thai": (r"""
故选C => C ;; 故选：D。 => D ;; 所以答案选B => B ;; 因此正确答案是A。 => A ;; 正确选项是D => D ;; 答案：B => B ;; 答案是（C） => C
综上，应选（B） => B ;; 选择C => C ;; 选C，因为3+4=7 => C ;; 故答案为：A => A ;; 故選：B => B ;; A选项正确 => A ;; 正确的是选项C。 => C
B项正确，其余5项错误 => B ;; 选项A错误，选项B正确 => B ;; 选项B正确，选项C错误 => B ;; 选项B正确，选项C不正确 => B ;; 不选A，选B => B ;; 故选ABD => ABD
正解はBです => B ;; 答えはCです。 => C ;; 正解は(D) => D ;; 정답은 B입니다 => B ;; 정답: C => C ;; 답은 D이다. => D ;; คำตอบคือ C => C
คำตอบคือ ข้อ B => B ;; 本题选择B选项。 => B ;; 答案是B选项 => B ;; 答案选项为C => C ;; 答案应选D => D ;; 【答案】C => C
【答案】12 => 12 ;; 【答案】C¶【解析】因为3+4=7 => C ;; 选项B正确。 => B ;; Bを選びます => B ;; B가 정답입니다 => B
""", r"""
所以选AB => A ;; 故选C => D ;; 选项A是错误的，应选B。 => A
"""),
"Chinese numerals and intervals": (r"""
答案是一百零五。 => 105 ;; 答案是二十 => 20 ;; 答案是十二个 => 12 ;; 所以一共是四十二个苹果。 => 42 ;; 答案是三分之二 => 2/3 ;; 答案是百分之二十 => 20%
答案是三点五 => 3.5 ;; 答案是负三 => -3 ;; 答案是两千零一 => 2001 ;; 答案是一千二百三十四 => 1234 ;; 答案是一万二千 => 12000
答案是三亿五千万 => 350000000 ;; \boxed{四十二} => 42 ;; \boxed{\text{四十二}} => 42 ;; 答案是三角形 => 三角形 ;; 答案是二〇二四 => 2024
所以x的取值范围是(0,1]。 => (0,1] ;; 答案是(0,1) => (0,1) ;; 答案是[1,+∞)。 => [1,\infty) ;; 答案是区间(2,5) => (2,5)
所以解集为{1,2} => \{1,2\} ;; 答案是一半 => 1/2 ;; 答案是x>3 => x>3 ;; 取值范围是（1，2） => (1,2) ;; 答案是（1，2） => (1,2)
答えは四十二です => 42 ;; 答案是十 => 10 ;; 答案是两个 => 2
""", r"""
答案是四十二 => 43 ;; 答案是四十二 => 40 ;; 答案是三角形 => 3
"""),
"answer tags": (r"""
<answer> 42 </answer> => 42 ;; <answer>42 apples</answer> => 42
<think>3+4</think>¶<answer>7</answer> => 7 ;; <answer>\boxed{7}</answer> => 7
<answer>¶\frac{1}{2}¶</answer> => 0.5 ;; <ANSWER>B</ANSWER>¶It took 3 steps => B
<final_answer>12</final_answer> (5 steps) => 12 ;; <answer>x = 3</answer> => 3
<answer>The answer is 12.</answer> 4 => 12 ;; <answer>12 => 12 ;; <answer></answer> So 5 => 5
<answer>3</answer> no, <answer>4</answer> => 4 ;; <answer>(1, 2)</answer> uses 3 => (1,2)
<answer>$12.50</answer> => 12.5 ;; <answer>1,234</answer> => 1234 ;; <answer>three</answer> => 3
<answer>c</answer> => C ;; <answer>(B) 12</answer> => B ;; <answer>No</answer> 3 => no
<answer>2x+1</answer> 3 => 2x+1 ;; <answer>First 3+4=7.¶So the total is 7*2=14.</answer> ok 3 => 14
Put it in <answer></answer>. \boxed{9} => 9 ;; [ANSWER] 42 [/ANSWER] 3 => 42
<answer>答案是12个</answer> 3 => 12 ;; The answer is <answer>12</answer>, from 3*4 => 12
<answer>\{1,2\}</answer> => 1,2 ;; <answer>[0,1)</answer> => [0,1) ;; <answer>A, C</answer> => A, C
<answer>true</answer> => True
""", r"""
<answer>3</answer> no, <answer>4</answer> => 3 ;; <answer>5 km</answer> => 5 m ;; <answer>12</answer> => 1
"""),
"JSON answers": (r"""
{"final_answer": 12, "confidence": 0.9} => 12 ;; {'answer': '12', 'n': 3} => 12
{"reasoning": "3+4=7", "answer": "7 apples"} => 7 ;; {"answer": "\\frac{1}{2}", "steps": 3} => 0.5
{"answer": [2, 3], "n": 9} => 2,3 ;; {"answer": ["2", "-2"]} => 2,-2 ;; {"answer": -3.5, "s": 2} => -3.5
```json¶{¶  "thought": "2*3",¶  "answer": "C"¶}¶``` => C ;; {"Answer": "B", "why": "3 < 4"} => B
{"choice": "d"} => D ;; {"answer": true, "n": 3} => True ;; {"answer": null, "n": 3} => 3
Here: {"answer": 1234.5} (4 steps) => 1234.5 ;; {"answer": "x = 5", "n": 1} => 5
{"answer": "(3, 4)", "n": 1} => (3,4) ;; {"answer": {"value": 12, "unit": "km"}} => 12
{"result": 12, "steps": 3} => 12 ;; {"answer":"The answer is 42.","n":3} => 42
{"answer": "No real solutions", "n": 3} => no real solutions ;; {"answer": "1/2", "n":3} => 1/2
{"answer": "A", "options": {"A": 4, "B": 6}} => A ;; {"final answer": "50%"} => 50%
""", r"""
{"answer": "12 km", "n": 3} => 12 m
"""),
"parts in boxes of their own": (r"""
$x=\boxed{3}$, $y=\boxed{5}$ => 3,5 ;; (a) \boxed{3}¶(b) \boxed{5} => 3, 5
The roots are \boxed{2} or \boxed{3}. => 2,3 ;; x = \boxed{3} \text{ and } y = \boxed{5} => 3, 5
\[x = \boxed{3}, \quad y = \boxed{5}\] => 3, 5 ;; \boxed{1}, \boxed{2}, and \boxed{3} => 1,2,3
\boxed{1}, \boxed{2}, \boxed{3} => 1,2,3 ;; x=\boxed{3} and y=\boxed{5}. So the sum is \boxed{8} => 8
x=\boxed{3}, so y=\boxed{5} => 5 ;; First \boxed{4}. Wait, \boxed{5} => 5
\boxed{5}. Again: \boxed{5} => 5 ;; \boxed{5}, \boxed{5} => 5
the width is \boxed{3} cm and the length is \boxed{5} cm => 3,5 ;; x = \boxed{3}¶y = \boxed{5} => x=3,y=5
x = \boxed{3} and y = \boxed{5} => (3,5) ;; There are \boxed{3} cats and \boxed{5} dogs. => 3, 5
Step 1: 3+4 = \boxed{7}¶Step 2: 7*2 = \boxed{14} => 14 ;; \boxed{7} and then \boxed{14} => 14
\boxed{\frac12}, i.e. \boxed{0.5} => 1/2 ;; \boxed{\frac12} or \boxed{0.5} => 1/2
Part (a): \boxed{3}¶Part (b): \boxed{5} => 3,5 ;; 1. \boxed{3}¶2. \boxed{5} => 3,5
$\boxed{(1,2)}$ and $\boxed{(3,4)}$ => (1,2),(3,4) ;; \boxed{A} and \boxed{C} => A, C
a = \boxed{1}, b = \boxed{2} and c = \boxed{3} => 1,2,3 ;; x为\boxed{3}，y为\boxed{5} => 3,5
x=\boxed{3}和\boxed{5} => 3,5 ;; \boxed{3} + \boxed{5} = \boxed{8} => 8
$$x_1=\boxed{3},\ x_2=\boxed{5}$$ => 3,5
\begin{aligned} x&=\boxed{3} \\ y&=\boxed{5} \end{aligned} => 3,5 ;; - x: \boxed{3}¶- y: \boxed{5} => 3,5
**x** = \boxed{3}, **y** = \boxed{5} => 3,5
""", r"""
The roots are \boxed{2} or \boxed{3}. => 3 ;; \boxed{1}, \boxed{2}, \boxed{3} => 3
x = \boxed{3}¶y = \boxed{5} => x=5,y=3 ;; x = \boxed{3} and y = \boxed{5} => (5,3)
x = \boxed{3} and y = \boxed{5} => 5 ;; \boxed{A} and \boxed{C} => C
"""),
"letters chosen in English": (r"""
The answer is b => B ;; Answer: c => C ;; answer is (d). => D ;; Option a is correct. => A
I choose option (c). => C ;; I'd go with B. => B ;; So it is C. => C ;; It's D, since 3 < 4 => D
Therefore, B is the correct answer because 3+4=7. => B ;; (C) is correct. 3 + 4 = 7 => C
**B** is correct => B ;; The correct choice is b) 12 => B ;; The answer is (b) 12 km. => B
The answer is (b) 12 km. => 12 ;; The answer is (A), (B) and (D). => A,B,D
The answers are A and C. => A, C ;; The correct options are B and D => B, D ;; option b => B
\boxed{\text{A and C}} => A,C ;; \boxed{(A), (C)} => A,C ;; \boxed{(b)} => B
Option B is wrong. Option C is right. => C ;; Option C is right. Option B is wrong. => C
Choose c such that 3c = 12, so c = 4 => 4 ;; We pick a = 3 so the total is 12 => 12
Angle A is right, so the area is 6 => 6 ;; It's a 12 km road => 12 ;; Hence the correct option is E => E
Select C. => C ;; My choice: (D) => D ;; The right answer would be D => D ;; Answer: **c** => C
Answer: (c) => C ;; b is the correct answer => B ;; the answer is option c => C ;; Final answer: d => D
The answer is e. => e ;; The answer is i => i ;; correct answer: C. 3 apples => C ;; It must be A. => A
This corresponds to option (D). => D ;; which matches choice B. Checked 3 times => B
Answer is B, C => B, C ;; The answer is A, because B has 4 => A ;; A. 12 => A
""", r"""
The answer is A and C. => A ;; The answer is (A) or (C). => A ;; The answer is x. => X ;; \boxed{b} => B
"""),
"numbers in words": (r"""
The answer is two hundred. => 200 ;; The answer is three hundred and forty-two. => 342
The answer is three hundred forty-two => 342 ;; The answer is one thousand two hundred and five. => 1205
The answer is two million. => 2000000 ;; The answer is negative five. => -5
The answer is minus twelve => -12 ;; The answer is three point five. => 3.5
The answer is two thirds. => 2/3 ;; The answer is two-thirds => 2/3 ;; The answer is one half => 0.5
The answer is one and a half. => 1.5 ;; The answer is two and three quarters. => 11/4
The answer is a quarter. => 1/4 ;; The answer is a hundred => 100 ;; The answer is a thousand => 1000
The answer is eighty-four apples. => 84 ;; \boxed{\text{eighty-four}} => 84
\boxed{\text{one hundred and five}} => 105 ;; \boxed{\text{Thirty-Six}} => 36
\boxed{\text{fifteen dollars}} => 15 ;; The answer is twenty-one => 21 ;; The answer is Twenty One. => 21
The answer is zero. => 0 ;; The answer is ninety-nine thousand => 99000
The answer is nine hundred ninety-nine thousand nine hundred ninety-nine => 999999
So there are forty-two apples left. => 42 ;; So he has seven. => 7 ;; The answer is three-fifths. => 3/5
The answer is twenty-first. => 21 ;; The answer is five hundredths => 0.05 ;; The answer is one-tenth => 0.1
\boxed{\frac{1}{2}} or one half => 0.5 ;; Answer: twelve => 12 ;; #### twelve => 12
The answer is twelve (12). => 12 ;; The answer is twelve hundred. => 1200 ;; The answer is two dozen => 2
The answer is one million two hundred thousand. => 1200000 ;; **Answer: forty** => 40
""", r"""
The answer is two million. => 2 ;; \boxed{\text{eighty-four}} => 80 ;; \boxed{\text{eighty-four}} => 4
The answer is none. => 0 ;; The answer is thirteen. => 30 ;; The answer is one of them. => 1
No one knows. => 1 ;; The answer is fifth => 1/5 ;; The answer is three more than five. => 3
\boxed{\text{six minutes}} => 6 hours ;; \boxed{\text{two pi}} => 2 ;; The answer is an integer => 1
"""),
"magnitudes": (r"""
So the city has 3 million people. => 3000000 ;; It costs $2.5 billion. => 2500000000
The total is 5 thousand dollars => 5000 ;; The answer is 1.2 million. => 1200000
The answer is 1.2 million people => 1200000 ;; \boxed{1.2 \text{ million}} => 1200000
\boxed{3 \text{ thousand}} => 3000 ;; \boxed{1.2 million} => 1200000
Es gibt 3 Millionen Menschen => 3000000 ;; Hay 2 millones de personas => 2000000 ;; 一共有120万人 => 1200000
人口は1.2億人です => 120000000 ;; 5만 원입니다 => 50000 ;; The answer is 5 lakh. => 500000
It is 2 crore rupees => 20000000 ;; \boxed{\$1.2\text{ million}} => 1200000
2 million = 2,000 thousand => 2000000
""", r"""
The answer is 5 thousand => 5 million
"""),
"digit groups": (r"""
The answer is 12,34,567. => 1234567 ;; So he got 1,50,000 votes => 150000 ;; \boxed{1,00,000} => 100000
\boxed{1'000'000} => 1000000 ;; The answer is 1'250. => 1250 ;; The answer is 1’250’000. => 1250000
The answer is 1 250 000. => 1250000 ;; The answer is 1 250 km => 1250 ;; The answer is 1 250 000. => 1250000
So the total is 1 250 000 people => 1250000 ;; So the total is 12 500 roubles => 12500
\boxed{1.250.000} => 1250000 ;; \boxed{1 250 000} => 1250000 ;; (1,00,000) => 100000
Total: Rs. 2,50,000/- => 250000 ;; The answer is 1,23,456.78 => 123456.78 ;; He walked 2 1/2 km => 2 1/2
The answer is 3 125/1000 => 3.125 ;; \boxed{1{,}00{,}000} => 100000 ;; There were 2 100 metre races => 2100
""", r"""
\boxed{12,34} => 1234 ;; \boxed{1,00,00} => 10000 ;; \boxed{1,2,3} => 123 ;; \boxed{1\,00\,000} => 100000
\boxed{5'6} => 56
"""),
"currencies": (r"""
\boxed{¥500} => 500 ;; \boxed{₩5,000} => 5000 ;; \boxed{500 ₫} => 500 ;; \boxed{CHF 500} => 500
\boxed{500 kr} => 500 ;; \boxed{R\$ 500} => 500 ;; \boxed{US\$500} => 500 ;; The answer is ₹500. => 500
The answer is Rs 500 => 500 ;; The answer is Rs. 500. => 500 ;; So the cost is ₹1,200.50 => 1200.5
costs ₽300 in total => 300 ;; The answer is 500₺ => 500 ;; The answer is 500 zł => 500
\boxed{500\text{ zł}} => 500 ;; The answer is R$500 => 500 ;; The answer is CHF 12.50 => 12.5
The answer is A$20 => 20 ;; The answer is 20 EUR => 20 ;; The answer is 20€ => 20 ;; \boxed{20€} => 20
\boxed{20 EUR} => 20 ;; The answer is 5¢. => 5 ;; Answer: Rs.500/- => 500 ;; \boxed{\text{Rs. }500} => 500
\boxed{\text{Rs. 500}} => 500 ;; \boxed{\text{₹}500} => 500 ;; \boxed{\yen 500} => 500
\boxed{\pounds 5} => 5 ;; \boxed{\euro 5} => 5 ;; \boxed{500 INR} => 500 ;; \boxed{500 rupees} => 500
\boxed{Rs 500} => 500 ;; \boxed{500元} => 500 ;; \boxed{NT\$500} => 500 ;; \boxed{￥500} => 500
\boxed{-₹500} => -500 ;; \boxed{₿0.5} => 0.5 ;; It is kr.500 => 500 ;; \boxed{500 \text{ VND}} => 500
\boxed{500 Ft} => 500
""", r"""
\boxed{5 cents} => 5 dollars
"""),
"old TeX": (r"""
\boxed{{x+1 \over x-1}} => \frac{x+1}{x-1} ;; \boxed{\sqrt{3}\over 2} => \frac{\sqrt3}{2}
\boxed{-{1\over 2}} => -0.5 ;; \boxed{5 \choose 2} => 10 ;; \boxed{{n \choose k}} => \binom{n}{k}
\boxed{\nicefrac{3}{4}} => 0.75 ;; \boxed{2\nicefrac{1}{2}} => 2.5 ;; \boxed{2{1\over2}} => 2.5
\boxed{x = {7\over4}} => 7/4 ;; \boxed{1+{1\over2}} => 1.5 ;; \boxed{{1+1\over2}} => 1
\boxed{\nicefrac12} => 0.5 ;; \boxed{\sfrac{a}{b}} => a/b ;; \boxed{\root 3 \of 8} => 2
The answer is $7\over4$. => 7/4 ;; The answer is ${\pi\over 6}$ => \pi/6 ;; \boxed{{3\over4}\pi} => 3\pi/4
\boxed{\frac{1}{2}} => 1\over 2 ;; \boxed{\flatfrac{1}{2}} => 0.5 ;; \boxed{\dbinom{5}{2}} => 5 \choose 2
""", r"""
$\boxed{5\choose 2}$ => 5/2
"""),
"TeX dress": (r"""
\boxed{\textcolor{red}{5}} => 5 ;; \boxed{{\color{blue}5}} => 5 ;; \boxed{\color{red} 5} => 5
\boxed{\colorbox{yellow}{5}} => 5 ;; \boxed{\color{red}{\frac{1}{2}}} => 0.5
\boxed{\begin{aligned}x&=3\\y&=5\end{aligned}} => x=3,y=5
\boxed{\begin{align*}x&=2+3\\&=5\end{align*}} => 5 ;; \boxed{\begin{gathered}5\end{gathered}} => 5
\boxed{\begin{array}{l}5\end{array}} => 5 ;; \boxed{\begin{cases}x=3\\y=5\end{cases}} => (3,5)
\boxed{45^\degree} => 45 ;; \boxed{45^{\degree}} => 45 ;; \boxed{45^o} => 45 ;; \boxed{45°} => 45
\boxed{45\text{ degrees}} => 45 ;; \boxed{45^{\circ}\text{C}} => 45 ;; \boxed{\lbrack 0,1 \rbrack} => [0,1]
\boxed{\left\lbrack 0,1\right)} => [0,1) ;; \boxed{\text{The final answer is } 7} => 7
\boxed{\text{Answer: } 7} => 7 ;; \boxed{\text{There are } 7 \text{ ways}} => 7 ;; \boxed{\textbf{5}} => 5
\boxed{\Large 5} => 5 ;; \boxed{\mathtt{5}} => 5 ;; \boxed{\underline{5}} => 5
\boxed{\ensuremath{5}} => 5 ;; \boxed{x+2=7 \implies x=5} => 5 ;; \boxed{\therefore 5} => 5
\boxed{5 \quad} => 5 ;; \boxed{5\text{ (units)}} => 5 ;; \boxed{\text{Total} = 5} => 5 ;; \boxed{\bf 5} => 5
\boxed{\displaystyle{\frac{1}{2}}} => 0.5 ;; \boxed{\mathbf{\color{red}{5}}} => 5
\boxed{\text{x = } 5} => 5 ;; \boxed{\text{5 ways}} => 5 ;; \boxed{5 \text{ways}} => 5 ;; \boxed{~5~} => 5
\boxed{5 \tag{1}} => 5 ;; \boxed{\bm{5}} => 5 ;; \boxed{5\checkmark} => 5
\boxed{\begin{split}a&=1,\\b&=2\end{split}} => a=1,b=2 ;; \boxed{\textstyle\frac12} => 0.5
\boxed{\mathrm{x}=5} => 5 ;; \boxed{5\%} => 0.05
""", r"""
\boxed{\left\lbrack 0,1\right)} => [0,1] ;; \boxed{\text{at most } 7} => 7 ;; \boxed{\text{June } 20} => 20
\boxed{\begin{aligned}5\end{aligned}} => 6 ;; \boxed{\text{Yes, it is}} => no
\boxed{\begin{aligned}x&=3\\y&=5\end{aligned}} => x=5,y=3 ;; \boxed{30\degree} => \frac{\pi}{6}
"""),
"sets and intervals": (r"""
\boxed{\{x\mid 0<x<1\}} => (0,1) ;; \boxed{\{x : x > 3\}} => (3,\infty)
\boxed{\{x\in\mathbb{R}\mid x\ge 3\}} => [3,\infty)
\boxed{\{x\in\mathbb R: x\neq 2\}} => (-\infty,2)\cup(2,\infty)
\boxed{\{x \mid x<1 \text{ or } x>2\}} => (-\infty,1)\cup(2,\infty)
\boxed{\{x | x<1 或 x>2\}} => (-\infty,1)\cup(2,\infty) ;; \boxed{]0,1[} => (0,1) ;; \boxed{]0,1]} => (0,1]
\boxed{[0,1[} => [0,1) ;; \boxed{]-\infty,3[} => (-\infty,3) ;; \boxed{]0;1[} => (0,1)
\boxed{]0,1[\cup]2,3[} => (0,1)\cup(2,3) ;; \boxed{\left]0,1\right[} => (0,1) ;; \boxed{x\in ]0,1[} => (0,1)
\boxed{\mathbb{R}} => (-\infty,\infty) ;; \boxed{\text{all reals}} => (-\infty,\infty)
\boxed{\text{All real numbers}} => \mathbb{R} ;; \boxed{x\in\mathbb{R}} => \mathbb{R}
\boxed{\text{all real numbers except } 3} => (-\infty,3)\cup(3,\infty)
\boxed{\mathbb{R}\setminus\{1,2\}} => x\ne1, x\ne2 ;; \boxed{ℝ} => (-\infty,\infty)
The answer is all real numbers. => (-\infty,\infty) ;; \boxed{(0,1) \cup \{2\}} => (0,1)\cup\{2\}
\boxed{[1,2],[3,4]} => [1,2],[3,4] ;; \boxed{\{x \,|\, x > 3\}} => x>3
\boxed{\left\{x\,:\,-1\le x<2\right\}} => [-1,2) ;; \boxed{\{y \in \mathbb{R} \mid y \geq 0\}} => [0,\infty)
\boxed{(-\infty, \infty)} => \text{all real numbers} ;; \boxed{\text{any real number}} => \mathbb{R}
\boxed{\{x \text{ such that } x>3\}} => (3,\infty) ;; \boxed{1:2} => 1:2 ;; \boxed{\{1:2\}} => 1:2
\boxed{\mathbb{R}^+} => (0,\infty) ;; \boxed{\R} => \mathbb{R} ;; \boxed{-\infty<x<\infty} => \mathbb{R}
\boxed{\{x\in\mathbb{R}\}} => \mathbb{R} ;; \boxed{\text{real numbers}} => \mathbb{R}
""", r"""
\boxed{\{x\in\mathbb{Z}:0<x<1\}} => (0,1) ;; \boxed{]0,1[} => [0,1]
\boxed{\text{all real numbers except }3} => (-\infty,\infty) ;; \boxed{\mathbb{R}} => \mathbb{Z}
\boxed{\{x: x^2=4\}} => \{2,-2\} ;; \boxed{\{x|1<x<2\}} => [1,2)
"""),
"statements in other languages": (r"""
La respuesta es 42, porque 6*7=42 y 3 es 3. => 42 ;; La respuesta es 42 euros, es decir 3 más que 39. => 42
La réponse est 42 euros, soit 3 de plus que 39. => 42 ;; La réponse est donc 42, et non 39. => 42
Die Antwort lautet: 42. (3 Schritte) => 42 ;; Antwort: 42 Äpfel (3 mehr als 39) => 42
Ответ: 42 рубля. Проверено 3 раза. => 42 ;; Ответ — 42. Шагов 3 => 42
Ответ: $\frac{1}{2}$. Шагов 3 => 0.5 ;; A resposta é 42 reais, 3 a mais que 39. => 42
La risposta è 42 mele, 3 in più di 39. => 42 ;; Het antwoord is 42, 3 meer dan 39 => 42
Odpowiedź: 42 (3 kroki) => 42 ;; 答えは42個です。3個多いです。 => 42 ;; 정답은 42개이고, 39보다 3개 많습니다. => 42
الجواب هو 42، أي 3 أكثر من 39 => 42 ;; الإجابة: 42 (3 خطوات) => 42
Cevap 42'dir, yani 39'dan 3 fazla. => 42 ;; Đáp án là 42, hơn 39 là 3. => 42
Jawabannya adalah 42, 3 lebih dari 39 => 42 ;; उत्तर 42 है, 39 से 3 अधिक। => 42
คำตอบคือ 42 ซึ่งมากกว่า 39 อยู่ 3 => 42 ;; Svaret är 42, 3 mer än 39. => 42
Vastaus on 42, 3 enemmän kuin 39 => 42 ;; Jibu ni 42, 3 zaidi => 42 ;; উত্তর হল 42, 3 বেশি => 42
La respuesta es 3,5. => 3.5 ;; Die Antwort ist 3,5 kg. => 3.5 ;; Die Antwort ist 1.234,56 Euro => 1234.56
La respuesta es (3,5). => (3,5) ;; La respuesta es C. => C
La respuesta correcta es la opción B, 3 metros => B ;; Die richtige Antwort ist (D). => D
La réponse est la C. => C ;; Ответ: B => B ;; A resposta correta é a letra E. => E ;; Đáp án: C => C
La réponse est -5. => -5 ;; Die Antwort ist x = 5. Probe 3 => 5 ;; Respuesta final: \frac{3}{4} => 0.75
**Respuesta:** 42¶¶Comprobación: 6*7 => 42 ;; Η απάντηση είναι 42, 3 παραπάνω => 42
התשובה היא 42, 3 יותר => 42 ;; Răspunsul este 42, cu 3 mai mult => 42 ;; A válasz 42, azaz 3-mal több => 42
Відповідь: 42 (3 кроки) => 42 ;; پاسخ: 42 است، 3 بیشتر => 42 ;; La respuesta es 3 y 5. => 3,5
Um zu antworten, rechnen wir 3*4 = 12 => 12 ;; Para dar una respuesta sumamos 3 y 4: total 7 => 7
So he answers 3 of them and 5 remain => 5
""", r"""
Die Antwort ist 42. => 39 ;; Die Antwort ist 3 und 5. => 3 ;; La respuesta es cuarenta y dos => 40
"""),
"all kinds, written after the rules": (r"""
小红还剩下17元。 => 17 ;; 共需要8.5小时才能完成 => 8.5 ;; 所以甲的年龄是36岁，乙的年龄是12岁 => 12 ;; 因此最大值为-2 => -2 ;; 答案是：36本 => 36
所以，答案是 25% 。 => 0.25 ;; 所以答案就是C了 => C ;; 综上所述，答案选择D。 => D ;; 正确答案为 B。 => B ;; 因此，选项 D 正确 => D
ゆえに、正しい選択肢はCです => C ;; 따라서 답은 24입니다. => 24 ;; 그러므로 정답은 ④번 => 4 ;; ดังนั้นคำตอบคือ 15 บาท => 15
答案：一千零二十四 => 1024 ;; <answer>¶12¶</answer> => 12 ;; <answer>Option B</answer> => B
<answer>B) 12 km</answer> => B ;; ```json¶{"answer": 3.5}¶```¶Done in 4 steps. => 3.5
{"question": 7, "answer": "D", "confidence": 0.8} => D
{"steps": ["3+4=7"], "final_answer": "\\boxed{7}"} => 7
Hence $a = \boxed{4}$ and $b = \boxed{-1}$. => 4, -1
The solutions are $\boxed{1}$, $\boxed{2}$ and $\boxed{3}$. => 1,2,3 ;; I think the answer is D. => D
Therefore the answer is d. => D ;; So choice (a) is right => A ;; Thus option c. => C
I would choose answer B => B ;; the correct answer is option (E). => E ;; B is right because 3+4=7 => B
So A is the best answer. => A ;; \boxed{\text{B and D}} => B,D ;; The answer is seventeen. => 17
The answer is five sixths. => 5/6 ;; The answer is four and a half => 4.5 ;; \boxed{\text{forty}} => 40
\boxed{\text{two hundred and fifty}} => 250 ;; Hence, the profit is 4.5 million dollars. => 4500000
That makes about 7 billion people. => 7000000000 ;; The answer is 10,00,000. => 1000000
The answer is 2'500. => 2500 ;; \boxed{₩12,000} => 12000 ;; The answer is ₽750. => 750
The answer is SEK 50 => 50 ;; \boxed{50\text{ SEK}} => 50 ;; \boxed{₫20.000} => 20
\boxed{a \over b} => a/b ;; \boxed{3 \choose 2} => 3 ;; \boxed{\color{blue}{x+1}} => x+1
\boxed{\textcolor{#FF0000}{5}} => 5 ;; \boxed{\color[rgb]{1,0,0}5} => 5
\boxed{\begin{aligned} 5 \end{aligned}} => 5 ;; \boxed{\text{So the answer is }\frac{1}{2}} => 1/2
\boxed{\{x\in\mathbb{R}:x\le-1\}} => (-\infty,-1] ;; \boxed{]2,+\infty[} => (2,\infty)
La bonne réponse est B. => B ;; Правильный ответ: C => C ;; Ответ: 3,5 часа => 3.5
La respuesta es 1/2. => 1/2 ;; Die Antwort ist -3°C. => -3 ;; The two numbers are 3 and 4. => 4
He has 5 apples, and 3 more. => 3 ;; It is on a 5-day trip with 7 people => 7 ;; I have a 4-sided shape => 4
He can select A 5 times, so 10 => 10 ;; The answer is an apple => apple ;; x_1 = 3 => 3
Vitamin C is the key: 5 mg => 5 ;; Room B is correct size; 12 m => 12 ;; The point is (3, 4). => (3,4)
""", r"""
Hence $a = \boxed{4}$ and $b = \boxed{-1}$. => -1 ;; The answer is B and D. => D
\boxed{\mathbb{Q}} => \mathbb{R} ;; The answer is 3 or 4 apples => 3
So Option A costs 5 and option B costs 7, so he saves 2 => 2 ;; It's a tie between A and B => B
"""),
}


def pairs(block: str) -> list[tuple[str, str]]:
    return [tuple(pair.strip().split(" <=> ")) for pair in block.replace("\n", " ;; ").split(" ;; ") if pair.strip()]


@pytest.mark.parametrize("a, b", pairs(EQUAL))
def test_the_same_answer_in_another_form_is_accepted(a, b):
    assert ev.is_equivalent(a, b) and ev.is_equivalent(b, a)


@pytest.mark.parametrize("a, b", pairs(DIFFERENT))
def test_a_near_miss_is_refused(a, b):
    assert not ev.is_equivalent(a, b) and not ev.is_equivalent(b, a)


@pytest.mark.parametrize("prediction, reference, verdict", ONE_WAY)
def test_a_base_may_be_left_out_of_the_prediction_only(prediction, reference, verdict):
    assert ev.is_equivalent(prediction, reference) is verdict


@pytest.mark.parametrize("completion, answer", COMPLETIONS)
def test_extraction(completion, answer):
    assert ev.extract_answer(completion) == answer


def graded(block: str) -> list[tuple[str, str]]:
    cases = block.strip().replace("\n", " ;; ").split(" ;; ")
    return [tuple(case.replace("¶", "\n").split(" => ")) for case in cases]


@pytest.mark.parametrize("kind", GRADED)
def test_answers_in_other_scripts_and_forms_are_accepted(kind):
    """Whole completions against the gold answer, as a person who reads the language would judge them."""
    lost = [case for case in graded(GRADED[kind][0]) if not ev.grade(*case)[1]]
    assert not lost


@pytest.mark.parametrize("kind", GRADED)
def test_near_misses_in_other_scripts_and_forms_are_refused(kind):
    """The same kinds with another number, letter, unit or end: tolerance must not become a false accept."""
    accepted = [case for case in graded(GRADED[kind][1]) if ev.grade(*case)[1]]
    assert not accepted


def test_a_magnitude_at_the_end_may_be_what_was_asked_for_or_not():
    """"There are 1.2 million people" answers "how many?" and "how many million?"; a stated "1.2 million" only the first."""
    assert ev.extract_answer("So there are 1.2 million people.") == "1.2 (million)"
    assert ev.is_equivalent("1.2 (million)", "1200000") and ev.is_equivalent("1.2 (million)", "1.2")
    assert not ev.grade("The answer is 1.2 million.", "1.2")[1]


def test_the_shown_cases_of_people():
    """Cases after public bug reports, which lie beside the project and not in it."""
    path = Path(__file__).resolve().parents[2] / "shared" / "cases" / "shown" / "grading.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    wrong = [row["id"] for row in rows(path) if ev.grade(row["completion"], row["gold"])[1] != row["expected"]]
    assert not wrong


def test_nothing_is_equivalent_to_nothing():
    """An empty answer is never right, not even where the gold answer is empty too."""
    for blank in ("", " ", "$$", "\\boxed{}", "."):
        assert not any(ev.is_equivalent(a, b) for a, b in ((blank, "5"), ("5", blank), (blank, blank)))
    assert not ev.is_equivalent(None, "5") and not ev.is_equivalent("5", None)


# ---- hostile text ----

REPEATED = ["(", "\"cm\"y", "y \\text{cm}", "-5 cm y", "{", "[", "\\{", "\\frac", "\\frac{", "\\sqrt{", "-", "x^",
            "9^", "2^{", "1+", "9", "1e9", "1/", "5!", "5%", "\\pm1", "1\\pm", "=1", "x=", "<1", ":1",
            "1,", "1,111", "1 ", " ", "\n", "\\text{", "\\text{a}", '"', "|", "|1|", "'", "x_{", "[[1],",
            "\\begin{pmatrix}", "&1", "\\cup(1,2)", "(1,2)\\cup", "^\\circ",
            "\\sin ", "\\log_", "\\sqrt[3]", "½", "\ufdfa", "\ud800", "\x00", "\\", "%s", "{0.__class__}", "$", "$1",
            "\\(", "\\[1", "\\boxed{", "\\boxed{}",
            "\\boxed{\n", "the answer is ", "answer:", "answer ", "####", "#### 1\n", "<think>", "</think>",
            "<|im_end|>", "\\approx 1", "1\\approx ", "0.\\overline{3}", "option A ",
            "\\binom{9}{", "f(", "-\\$", "\\setminus\\{1\\}", "Mr.", "ab ", "$1$, ", "1 1/",
            "选A", "第", "一百", "1万", "分之", "点五", "กข", "ответ ", "twenty-", "one hundred and ", "1,00,", "1'000",
            "1 000 ", "1.000", "Rs.", "<answer>", '{"answer": "', '"answer":["', "\\boxed{3} and ", "(A) and ",
            "\\over ", "\\color{red}{", "\\begin{aligned}", "{x|", "]0,1[", "(1,", "real numbers ", "1 million y "]
SINGLE = ["9**9**9**9", "9^{9^{9^{9}}}", "10^{10^{10}}", "2^{2^{2^{2^{2^2}}}}", "(10^{9})!", "100000!!",
          "((99999)!)!", "e^{e^{e^{e^{e^e}}}}", "\\sin(10^{10^{5}})", "x^{99999}", "x^{10^{20}}",
          "\\binom{99999}{50000}", "\\binom{10^{9}}{5}", "\\sqrt[10^9]{2}", "\\tan(\\pi/2)", "1/0", "0/0", "0^0",
          "\\log 0", "\\log_1 5", "\\infty-\\infty", "0\\cdot\\infty", "1e999999999", "-nan",
          "__import__('os').system('id')", "exec('import os')", "().__class__.__bases__[0].__subclasses__()",
          "open('/etc/passwd').read()", "{x.__init__.__globals__}", "%(a)s%n%n%n",
          "${jndi:ldap://x}", "$(id)", "\\input{/etc/passwd}", "\\write18{id}", "\\def\\x{\\x\\x}\\x",
          "[x for x in range(10**9)]", "'a'*10**9", "1<<10**9", "factorial(10**9)", "exit()", "quit",
          "\u202e5", "\ufeff5", "\udfff5", "a\x00b", "\x1b[2J", "\\sum_{i=1}^{10^9} i", "\\int_0^1 x dx",
          "+".join("99999!" for _ in range(280)), "+".join(f"{i}.5!" for i in range(280)),
          "+".join("9^{9999}" for _ in range(150)), "+".join(f"1/{10**12 + i}" for i in range(110)),
          "*".join(f"(x+{i})^{{99}}" for i in range(100)), "{" + ",".join(f"\\sin {i}" for i in range(150)) + "}",
          "{" + ",".join(f"(x+{i})!" for i in range(150)) + "}",
          ",".join(f"\\sqrt{{{i}+x}}" for i in range(2, 99)), "10^{\\pi\\cdot 9999}+" * 70 + "1", ",111" * 50_000 + "1"]


@pytest.mark.parametrize("piece", SINGLE + REPEATED)
def test_hostile_text_ends_soon_and_leaves_the_process_as_it_was(piece):
    """Code, towers of powers, a million digits, deep nesting, patterns that backtrack, half characters: a verdict
    within five seconds of this thread's own time (the longest take 0.6), no exception, no state changed."""
    import mpmath
    before = sys.getrecursionlimit(), sys.get_int_max_str_digits(), random.getstate(), mpmath.mp.prec
    for times in (1,) if piece in SINGLE else (7, 300, 100_000):
        text = piece * times
        for call in (lambda: ev.extract_answer(text), lambda: ev.extract_answer("The answer is " + text),
                     lambda: ev.extract_answer("答案是" + text), lambda: ev.extract_answer("\\boxed{" + text + "}"),
                     lambda: ev.is_equivalent(text, "5"), lambda: ev.is_equivalent("x+1", text),
                     lambda: ev.is_equivalent(text, text + " "), lambda: ev.is_equivalent(text + "+x", text + "+y"),
                     lambda: ev.is_equivalent(text + ",1", "2," + text)):
            start = time.thread_time()                    # not the clock on the wall: the machine may be crowded
            call()
            assert time.thread_time() - start < 5
    assert before == (sys.getrecursionlimit(), sys.get_int_max_str_digits(), random.getstate(), mpmath.mp.prec)


def test_the_grader_never_executes_text():
    """No eval, exec, compile, sympify or parse_expr anywhere in the file, no import of a module by a computed name."""
    source = open(ev.__file__, encoding="utf-8").read()
    assert not re.search(r"(?<![.\w])(?:eval|exec|compile|sympify|parse_expr|parse_latex|lambdify|__import__)\s*\(",
        source)


ALPHABET = st.sampled_from(["x", "y", "n", "1", "2", "10", "0.5", "+", "-", "*", "/", "^", "(", ")", "[", "]", "{",
    "}", ",", "=", "<", "\\le ", "\\frac", "\\sqrt", "\\pi", "\\sin ", "\\pm ", "\\cup ",
                            "\\text{cm}", "\\text{ or }", "\\{", "\\}", "\\infty", "|", "!", "%", "^\\circ", "_", "'",
                            ":", ";", " ", "i", "e", "f", "\\log", "\\begin{pmatrix}", "\\end{pmatrix}", "&",
                            "\\\\", "\\boxed{", "$", "the answer is ", "#### ", "A", "\ud800", "\x00", "½"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(ALPHABET, max_size=25).map("".join), st.lists(ALPHABET, max_size=25).map("".join))
def test_any_text_has_a_verdict(a, b):
    """Never an exception; the same both ways round unless a base is left out; and what is not blank equals itself."""
    ev.extract_answer(a)
    assert isinstance(verdict := ev.is_equivalent(a, b), bool)
    assert "_" in a + b or verdict == ev.is_equivalent(b, a)
    assert ev.is_equivalent(a, a) or not ev._clean(a)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_unicode_has_a_verdict(text):
    ev.extract_answer(text)
    ev.is_equivalent(text, "x+1")
    ev.is_equivalent("(1, 2)", text)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.fractions(max_denominator=999, min_value=-9999, max_value=9999), st.fractions(max_denominator=999,
    min_value=-9999, max_value=9999))
def test_fractions_are_compared_exactly(x, y):
    """Every way to write a fraction is that fraction and no other."""
    def ways(f):
        whole, rest = divmod(abs(f.numerator), f.denominator)
        sign = "-" if f < 0 else ""
        yield f"{f.numerator}/{f.denominator}"
        yield f"{sign}\\dfrac{{{abs(f.numerator)}}}{{{f.denominator}}}"
        yield f"x = {3 * f.numerator}/{3 * f.denominator} \\text{{ cm}}"
        if whole and rest:
            yield f"{sign}{whole}\\frac{{{rest}}}{{{f.denominator}}}"
    for a in ways(x):
        assert ev.is_equivalent(a, str(x))
        assert ev.is_equivalent(a, str(y)) == (x == y)


# ---- real material ----

def rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_public_equivalence_cases(assets):
    """Cases from public graders' own tests: at least 97 % agreement, at most 1 % false accepts, under 5 ms of work each."""
    cases = rows(assets / "grading" / "equiv_public.jsonl")
    ev.is_equivalent("x + y", "2x")                                   # the import
    start = time.thread_time()
    verdicts = [ev.is_equivalent(row["pred"], row["gold"]) for row in cases]
    assert (time.thread_time() - start) / len(cases) < 0.005
    assert sum(v == row["equal"] for v, row in zip(verdicts, cases)) >= 0.97 * len(cases)
    assert sum(v and not row["equal"] for v, row in zip(verdicts, cases)) <= 0.01 * len(cases)


def test_public_extraction_cases(assets):
    cases = rows(assets / "grading" / "extract_public.jsonl")
    right = [ev.extract_answer(row["completion"]) in [row["expect"], *row.get("accept", [])] for row in cases]
    assert sum(right) >= 0.97 * len(cases)


def rewritings(answer: str):
    """An answer as people also write it."""
    yield answer
    yield answer.replace("\\frac", "\\dfrac")
    yield re.sub(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2", answer)
    yield f"${answer}$"
    yield f"\\({answer}\\)."
    yield f"\\boxed{{{answer}}}"
    if "[" not in answer and "]" not in answer and "\\left" not in answer:
        yield re.sub(r"(?<!\\)\(", r"\\left(", answer).replace(")", "\\right)")
    if re.fullmatch(r"[A-Za-z ]+", answer):
        yield f"\\text{{{answer}}}"
    if match := re.fullmatch(r"(-?)\\frac\{(\d+)\}\{(\d+)\}", answer):
        yield f"{match[1]}{match[2]}/{match[3]}"
        if 10**9 % int(match[3]) == 0:
            yield match[1] + format(Decimal(match[2]) / Decimal(match[3]), "f")
    if re.fullmatch(r"-?\d+", answer):
        yield from (f"x = {answer}", answer + ".0", answer + "\\text{ cm}", f"{int(answer):,}",
            f"{int(answer):,}".replace(",", "{,}"))
    items = re.split(r",\s*", answer)
    if len(items) > 1 and not re.search(r"[(\[{]|\d,\d{3}|!|text", answer):
        yield ", ".join(reversed(items))
        yield ", ".join(items[:-1]) + " \\text{ and } " + items[-1]


def test_every_MATH_solution_grades_as_its_own_answer(assets):
    """Each of the 5000, as it is and rewritten; and almost never as another problem's."""
    answers = []
    for row in rows(assets / "math" / "tora_math_test_5000.jsonl"):
        answers.append(ev.extract_answer(row["solution"]))
        for text in rewritings(answers[-1]):
            assert ev.is_equivalent(text, answers[-1]) and ev.is_equivalent(answers[-1], text), (text, answers[-1])
    different = sorted(set(answers))
    values = random.Random(0)
    accepted = sum(ev.is_equivalent(*values.sample(different, 2)) for _ in range(4000))
    assert accepted <= 8                                              # \frac12 and 0.5 are among them


def test_agreement_with_the_publishers_verdicts(assets):
    """Real completions. The publisher of the third set compares text, so "45 kg", "$180." and "45<|im_end|>" count as
    wrong there and right here; what remains to be measured on it is whether we refuse anything that they accept."""
    answers = assets / "answers"

    def ours(completion, gold):
        answer = ev.extract_answer(completion)
        return answer is not None and ev.is_equivalent(answer, gold)

    abel = [(ours(row["response"], row["gold"]), row["result"]) for row in rows(answers / "abel_gsm8k_7b.jsonl")]
    assert sum(a == b for a, b in abel) >= 0.98 * len(abel)
    qwen = [(ours(code, row["answer"]), verdict) for row in rows(answers / "qwen25math_math_cot_100.jsonl") for code,
        verdict in zip(row["code"], row["score"])]
    assert sum(a == b for a, b in qwen) >= 0.98 * len(qwen)
    step_dpo = json.loads((answers / "ysui_gsm8k_llama2-7b-instruct-step-dpo.json").read_text(encoding="utf-8"))
    verdicts = [(ours(row["completion"], row["prompt_answer"][0]), row["result"]) for row in step_dpo]
    assert sum(theirs and not mine for mine, theirs in verdicts) <= 0.01 * len(verdicts)
